// Package powercut tests, in the guest only, that a store survives a power cut of the disk below it, on real file
// systems. TestPowerCuts lets the disk drop or fail all writes from a moment on (dm-flakey). TestLoggedWrites records
// every write (dm-log-writes), and then makes the disk as of each flush anew.
package powercut
