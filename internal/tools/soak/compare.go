package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
)

// compare reads a volume or snapshot, and compares it with its image.
func (w *world) compare(name string, im *image) error {
	d, err := w.server.dial(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer d.Abort()
	if d.Size() != im.size {
		return fmt.Errorf("%s is exported with %d bytes instead of %d", name, d.Size(), im.size)
	}
	if err := im.settleAll(name, d); err != nil {
		return err
	}
	return w.compareWith(name, im, d)
}

func (w *world) compareWith(name string, im *image, src io.ReaderAt) error {
	const part = 1 << 20
	got, want := make([]byte, part), make([]byte, part)
	for off := int64(0); off < im.size; off += part {
		w.brake.wait(context.Background())
		got, want := got[:min(part, im.size-off)], want[:min(part, im.size-off)]
		if _, err := src.ReadAt(got, off); err != nil {
			return fmt.Errorf("%s: read at %d: %w", name, off, err)
		}
		if err := im.read(want, off); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return wrongError{fmt.Errorf("%s: %s", name, difference(got, want, off))}
		}
	}
	w.state.add("MiB compared", int(im.size>>20))
	return nil
}

// compareAll compares all volumes, and those snapshots that are in doubt. It compares all other snapshots too if all is
// set, or else some.
func (w *world) compareAll(r *rand.Rand, all bool) error {
	for _, name := range slices.Sorted(maps.Keys(w.images)) {
		im := w.images[name]
		if !all && isSnapshot(name) && !im.doubtful() && r.IntN(5) > 0 {
			continue
		}
		if err := w.compare(name, im); err != nil {
			return err
		}
	}
	return nil
}
