package metadata

import (
	"bytes"
	"fmt"

	"github.com/vdisk/vdisk/format"
)

// change is a change of a key by an Update.
type change struct {
	bucket, key []byte
	old, value  []byte // nil: the key was not there, or is removed
	puts        []byte // of a leaf: how value differs from old (format.AppendPuts); nil: that is not known
	intact      bool   // old verifies, or there is none
}

// record adds the item of a change to the batch.
func (c *tableCopy) record(ch change) {
	if c.inUse == nil && c.making == nil || ch.old == nil && ch.value == nil {
		return
	}
	it := format.CopyItem{Op: format.CopyPut, Bucket: bucketNumber(ch.bucket), Key: ch.key, Value: ch.value}
	switch {
	case ch.value == nil:
		it.Op = format.CopyRemove
	case ch.old == nil || !ch.intact:
	case ch.puts != nil:
		// Comparing the values would cost several times as much as all else that is done here.
		if len(ch.puts) < len(ch.value) {
			it.Op, it.Value = format.CopyPuts, ch.puts
		}
	case bytes.Equal(ch.old, ch.value):
		return
	case len(ch.value) >= patchLeast:
		var ok bool
		if c.patch, ok = format.AppendPatch(c.patch[:0], ch.old, ch.value, len(ch.value)/4*3); ok {
			it.Op, it.Value = format.CopyPatch, c.patch
		}
	}
	if c.wrong != nil {
		c.prove(&it, ch)
	}
	if c.inUse != nil {
		c.inUse.add(&it)
	}
	if m := c.making; m != nil && m.has(it.Bucket, ch.key) {
		m.add(&it)
		m.count(ch.bucket, ch.key, ch.old, ch.value, ch.intact)
	}
}

// prove calls wrong if an item does not say what the table gets.
func (c *tableCopy) prove(it *format.CopyItem, ch change) {
	got, err := it.Apply(ch.old)
	if err == nil && !bytes.Equal(got, ch.value) {
		err = fmt.Errorf("it makes %x of %x, not %x", got, ch.old, ch.value)
	}
	if err != nil {
		c.wrong(fmt.Errorf("item of operation %d, %q %x: %w", it.Op, ch.bucket, ch.key, err))
	}
}
