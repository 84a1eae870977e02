//go:build lockcheck

package lockorder

import (
	"bytes"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
)

type (
	Mutex[L level]   struct{ mu sync.Mutex }
	RWMutex[L level] struct{ mu sync.RWMutex }
)

// held has the levels of the locks that each goroutine holds, in the order in which it took them.
var (
	heldMu sync.Mutex
	held   = map[uint64][]int{}
)

// goroutine returns the number of the caller's goroutine.
func goroutine() uint64 {
	var b [64]byte
	text := bytes.TrimPrefix(b[:runtime.Stack(b[:], false)], []byte("goroutine "))
	n, err := strconv.ParseUint(string(text[:bytes.IndexByte(text, ' ')]), 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func levelOf[L level]() int {
	var l L
	return l.level()
}

// taking notes that the goroutine is about to take a lock. If try is set, it does not wait for it, and any order will do.
func taking[L level](try bool) {
	g, l := goroutine(), levelOf[L]()
	heldMu.Lock()
	defer heldMu.Unlock()
	if has := held[g]; !try && len(has) > 0 && slices.Max(has) >= l {
		panic(fmt.Sprintf("lockorder: a lock of level %d is taken by a goroutine that holds locks of levels %v", l, has))
	}
	held[g] = append(held[g], l)
}

func left[L level]() {
	g, l := goroutine(), levelOf[L]()
	heldMu.Lock()
	defer heldMu.Unlock()
	i := slices.Index(held[g], l)
	if i < 0 {
		panic(fmt.Sprintf("lockorder: a lock of level %d is left by a goroutine that holds locks of levels %v", l, held[g]))
	}
	if held[g] = slices.Delete(held[g], i, i+1); len(held[g]) == 0 {
		delete(held, g)
	}
}

func (m *Mutex[L]) Lock()   { taking[L](false); m.mu.Lock() }
func (m *Mutex[L]) Unlock() { left[L](); m.mu.Unlock() }

// TryLock is sync.Mutex's.
func (m *Mutex[L]) TryLock() bool {
	ok := m.mu.TryLock()
	if ok {
		taking[L](true)
	}
	return ok
}

func (m *RWMutex[L]) Lock()    { taking[L](false); m.mu.Lock() }
func (m *RWMutex[L]) Unlock()  { left[L](); m.mu.Unlock() }
func (m *RWMutex[L]) RLock()   { taking[L](false); m.mu.RLock() }
func (m *RWMutex[L]) RUnlock() { left[L](); m.mu.RUnlock() }
