package storage

import "os"

// BootID changes with every boot (random(4)).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(b[:min(36, len(b))]), err
}
