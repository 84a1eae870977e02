//go:build lockcheck

package lockorder

import (
	"strings"
	"sync"
	"testing"
)

// TestOrder: the order passes, by steps and with some left out, and everything else panics.
func TestOrder(t *testing.T) {
	var cleaner Mutex[Cleaner]
	var store Mutex[Store]
	var shard, other RWMutex[Shard]
	var forwards Mutex[Forwards]
	for name, c := range map[string]struct {
		locks []sync.Locker
		good  bool
	}{
		"in order":        {[]sync.Locker{&cleaner, &store, &shard, &forwards}, true},
		"some left out":   {[]sync.Locker{&cleaner, &forwards}, true},
		"the wrong way":   {[]sync.Locker{&shard, &store}, false},
		"around a corner": {[]sync.Locker{&cleaner, &shard, &store}, false},
		"two of a level":  {[]sync.Locker{&shard, &other}, false},
		"readers too":     {[]sync.Locker{&forwards, shardReader{&shard}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var taken []sync.Locker
			defer func() {
				text, _ := recover().(string)
				if (text == "") != c.good || !c.good && !strings.Contains(text, "lockorder: a lock of level") {
					t.Errorf("it panics with %q", text)
				}
				for _, l := range taken {
					l.Unlock()
				}
				if len(held) > 0 {
					t.Errorf("held afterwards: %v", held)
				}
			}()
			for _, l := range c.locks {
				l.Lock()
				taken = append(taken, l)
			}
		})
	}
}

type shardReader struct{ m *RWMutex[Shard] }

func (r shardReader) Lock()   { r.m.RLock() }
func (r shardReader) Unlock() { r.m.RUnlock() }
