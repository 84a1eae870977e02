package storage

import (
	"os"
	"sync/atomic"
)

var bootID atomic.Pointer[string]

// BootID returns the id of this boot, which changes with every boot (random(4)). It cannot change during the life of a
// process, so the file is read once.
func BootID() (string, error) {
	if id := bootID.Load(); id != nil {
		return *id, nil
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	id := string(b[:min(36, len(b))])
	if err == nil {
		bootID.Store(&id)
	}
	return id, err
}
