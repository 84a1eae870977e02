package metadata

import (
	"bytes"
	"errors"

	"github.com/vdisk/vdisk/format"
)

// changesAtOnce is how many changes of an Update are handed over at a time.
var changesAtOnce = 256 // tests make it smaller

// changeList is changes of keys, in the order in which an Update makes them. The values are those that bbolt has until the
// commit; the keys are copies.
type changeList struct {
	of   []change
	keys []byte
}

type change struct {
	bucket, old, value []byte
	key                int // where it ends in keys; it begins where the one before ends
	intact             bool
}

// itemMaker hands the changes of an Update to a goroutine that makes the items of the batch of them. Comparing each old
// value with the new one is most of what the copy costs, and the Update need not wait for it before it has made all
// changes.
type itemMaker struct {
	list *changeList
	full chan *changeList // nil: there is no goroutine
	free chan *changeList
	made chan error
}

func (m *itemMaker) reset() {
	if m.list != nil {
		m.list.of, m.list.keys = m.list.of[:0], m.list.keys[:0]
	}
}

// record adds a change of a key to the batch. old is nil if the key is not there, and value is nil if it is removed.
// intact says that the old value verifies.
func (c *tableCopy) record(bucket, key, old, value []byte, intact bool) {
	if c.inUse == nil && c.making == nil || old == nil && value == nil {
		return
	}
	m := &c.items
	if m.list == nil {
		m.list = new(changeList)
	}
	l := m.list
	l.keys = append(l.keys, key...)
	l.of = append(l.of, change{bucket, old, value, len(l.keys), intact})
	if len(l.of) < changesAtOnce {
		return
	}
	if m.full == nil {
		m.full, m.made = make(chan *changeList, 1), make(chan error, 1)
		m.free = make(chan *changeList, cap(m.full)+1)
		go c.makeItems(m.full, m.free, m.made)
	}
	m.full <- l
	select {
	case m.list = <-m.free:
	default:
		m.list = nil
	}
}

// makeItems makes items of all changes that come.
func (c *tableCopy) makeItems(full <-chan *changeList, free chan<- *changeList, made chan<- error) {
	var err error
	for l := range full {
		err = errors.Join(err, Guard(func() error { c.addItems(l); return nil }))
		l.of, l.keys = l.of[:0], l.keys[:0]
		select {
		case free <- l:
		default:
		}
	}
	made <- err
}

func (c *tableCopy) addItems(l *changeList) {
	at := 0
	for _, ch := range l.of {
		c.addItem(ch, l.keys[at:ch.key])
		at = ch.key
	}
}

// addItem adds the item of a change.
func (c *tableCopy) addItem(ch change, key []byte) {
	if ch.old != nil && ch.value != nil && ch.intact && bytes.Equal(ch.old, ch.value) {
		return
	}
	n := bucketNumber(ch.bucket)
	it := format.CopyItem{Op: format.CopyPut, Bucket: n, Key: key, Value: ch.value}
	switch {
	case ch.value == nil:
		it.Op = format.CopyRemove
	case ch.old != nil && ch.intact && len(ch.value) >= patchLeast:
		var ok bool
		if c.patch, ok = format.AppendPatch(c.patch[:0], ch.old, ch.value, len(ch.value)/4*3); ok {
			it.Op, it.Value = format.CopyPatch, c.patch
		}
	}
	if c.inUse != nil {
		c.inUse.add(&it)
	}
	if m := c.making; m != nil && m.has(n, key) {
		m.add(&it)
		m.count(ch.bucket, key, ch.old, ch.value, ch.intact)
	}
}

// stopItems waits until the goroutine has made items of all that it was given, and ends it.
func (c *tableCopy) stopItems() {
	m := &c.items
	if m.full == nil {
		return
	}
	close(m.full)
	err := <-m.made
	m.full = nil
	if err == nil {
		return
	}
	if c.inUse != nil {
		c.inUse.err = errors.Join(c.inUse.err, err)
	}
	if c.making != nil {
		c.making.err = errors.Join(c.making.err, err)
	}
}

// endItems makes items of all changes that the Update has made.
func (c *tableCopy) endItems() {
	c.stopItems()
	if c.items.list != nil {
		c.addItems(c.items.list)
	}
	c.items.reset()
}
