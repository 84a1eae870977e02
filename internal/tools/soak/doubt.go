package main

import "fmt"

// doubt is a command that was cut off. settle finds out from the names that there are, with their sizes, what it did.
type doubt struct {
	what   string
	settle func(names map[string]int64) error
}

func (w *world) inDoubt(what string, settle func(names map[string]int64) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.doubts = append(w.doubts, doubt{what, settle})
}

// maybe puts images under their names when the next server is there: all of them, or none.
func (w *world) maybe(what string, images map[string]*image) {
	w.inDoubt(what, func(names map[string]int64) error {
		n := 0
		for name := range images {
			if _, ok := names[name]; ok {
				n++
			}
		}
		if n != 0 && n != len(images) {
			return fmt.Errorf("%d of %d are there", n, len(images))
		}
		if n == 0 {
			w.discard(images)
			return nil
		}
		for name, im := range images {
			w.put(name, im)
		}
		return nil
	})
}

// settle ends all doubts about names, and compares names and sizes.
func (w *world) settle() error {
	names, err := w.list()
	if err != nil {
		return err
	}
	for _, d := range w.doubts {
		if err := d.settle(names); err != nil {
			return fmt.Errorf("after '%s' was cut off: %w", d.what, err)
		}
	}
	w.state.add("commands cut off", len(w.doubts))
	w.doubts = nil
	for name, im := range w.images {
		size, ok := names[name]
		if !ok {
			return fmt.Errorf("%s is gone", name)
		}
		if size != im.size {
			return fmt.Errorf("%s has %d bytes instead of %d", name, size, im.size)
		}
	}
	for name := range names {
		if w.images[name] == nil {
			return fmt.Errorf("%s is there, and should not be", name)
		}
	}
	return nil
}
