package testwatch

import (
	"cmp"
	"os"
)

// Memory is the folder in memory for stores of tests, which may not be there. A program that runs tests and may have to
// kill them names a folder of its own in VDISK_TEST_MEMORY, and removes it afterwards.
func Memory() string { return cmp.Or(os.Getenv("VDISK_TEST_MEMORY"), "/dev/shm") }
