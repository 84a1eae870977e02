//go:build !lockcheck

package lockorder

import "sync"

type (
	Mutex[L level]   = sync.Mutex
	RWMutex[L level] = sync.RWMutex
)
