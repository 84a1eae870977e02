package format

import (
	"bytes"
	"fmt"
)

// CopyBatchMagic is what the head of a batch begins with.
var CopyBatchMagic = []byte("CPYB")

const (
	copyMagic = "VDISKCPY"

	// CopyHeaderSize is the size in bytes of the header of a copy of the table.
	CopyHeaderSize = 32
	// CopyHeadSize is the size in bytes of the head of a batch.
	CopyHeadSize = 40

	copyItemHead = 8 // what stands before the key of an item

	maxCopyKey   = 1 << 10
	maxCopyValue = 1 << 26
)

// AppendCopyHeader appends the header of a copy of the table of a store (docs/format.md, The copy of the table).
func AppendCopyHeader(dst []byte, store [16]byte) []byte {
	at := len(dst)
	dst = append(dst, copyMagic...)
	dst = le.AppendUint32(dst, layoutVersion)
	dst = append(dst, store[:]...)
	return le.AppendUint32(dst, Checksum(dst[at:]))
}

// DecodeCopyHeader returns the store that a copy belongs to. The error matches ErrCorrupt or ErrVersion.
func DecodeCopyHeader(src []byte) (store [16]byte, err error) {
	const what = "header of the copy"
	if len(src) < CopyHeaderSize {
		return store, corrupt(what, "%d bytes, want %d", len(src), CopyHeaderSize)
	}
	if string(src[:8]) != copyMagic {
		return store, corrupt(what, "magic %q", src[:8])
	}
	if got, want := Checksum(src[:28]), le.Uint32(src[28:]); got != want {
		return store, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	copy(store[:], src[12:28])
	return store, checkVersion(what, int(le.Uint32(src[8:])), layoutVersion)
}

// CopyKind is the kind of a batch.
type CopyKind uint32

// The kinds of batches. A copy begins with the parts of the base, which ends with an empty CopyBaseEnd. Only changes
// follow it.
const (
	CopyBase CopyKind = 1 + iota
	CopyBaseEnd
	CopyChanges
)

// CopyHead is the head of a batch of changes of the table.
type CopyHead struct {
	Kind   CopyKind
	Number uint64 // rises by one with each batch
	Length uint64 // of the items
	Sum    uint64 // of the table after the batch; 0 in a CopyBase
	Items  uint32 // the CRC of the items
}

// Encode returns the head of a batch at an offset of the file.
func (h *CopyHead) Encode(off int64) (b [CopyHeadSize]byte) {
	copy(b[:], CopyBatchMagic)
	le.PutUint32(b[4:], uint32(h.Kind))
	le.PutUint64(b[8:], h.Number)
	le.PutUint64(b[16:], h.Length)
	le.PutUint64(b[24:], h.Sum)
	le.PutUint32(b[32:], h.Items)
	le.PutUint32(b[36:], headChecksum(b[:36], off))
	return b
}

// headChecksum covers the place too, so that what is left over from another place does not verify.
func headChecksum(b []byte, off int64) uint32 {
	return Checksum(le.AppendUint64(append(make([]byte, 0, CopyHeadSize+8), b...), uint64(off)))
}

// DecodeCopyHead decodes the head at an offset of the file. The error matches ErrCorrupt.
func DecodeCopyHead(src []byte, off int64) (h CopyHead, err error) {
	const what = "batch of the copy"
	if len(src) < CopyHeadSize {
		return h, corrupt(what, "%d bytes, want %d", len(src), CopyHeadSize)
	}
	if !bytes.Equal(src[:4], CopyBatchMagic) {
		return h, corrupt(what, "magic %q", src[:4])
	}
	if got, want := headChecksum(src[:36], off), le.Uint32(src[36:]); got != want {
		return h, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	h = CopyHead{CopyKind(le.Uint32(src[4:])), le.Uint64(src[8:]), le.Uint64(src[16:]), le.Uint64(src[24:]), le.Uint32(src[32:])}
	if h.Kind < CopyBase || h.Kind > CopyChanges {
		return h, corrupt(what, "kind %d", h.Kind)
	}
	return h, nil
}

// CopyOp says what an item does with its key.
type CopyOp uint8

// The operations of items.
const (
	CopyPut    CopyOp = 1 + iota // the key has this value
	CopyRemove                   // the key is gone
	CopyPatch                    // the value is a patch of the one that the key had
	CopyPuts                     // the key has a leaf, and the value says which of its blocks were put (AppendPuts)
)

// CopyItem is the change of one key.
type CopyItem struct {
	Op         CopyOp
	Bucket     uint8
	Key, Value []byte
}

// AppendCopyItem appends an item.
func AppendCopyItem(dst []byte, it *CopyItem) []byte {
	dst = append(dst, byte(it.Op), it.Bucket)
	dst = le.AppendUint16(dst, uint16(len(it.Key)))
	dst = le.AppendUint32(dst, uint32(len(it.Value)))
	return append(append(dst, it.Key...), it.Value...)
}

// DecodeCopyItem decodes the item at the front of src, and returns what follows it. The item's key and value are parts
// of src. If src ends within the item, need is the number of bytes that the item takes, as far as src says; otherwise
// it is 0. The error matches ErrCorrupt.
func DecodeCopyItem(src []byte) (it CopyItem, rest []byte, need int, err error) {
	if len(src) < copyItemHead {
		return it, src, copyItemHead, nil
	}
	it.Op, it.Bucket = CopyOp(src[0]), src[1]
	key, value := int(le.Uint16(src[2:])), int(le.Uint32(src[4:]))
	switch {
	case it.Op < CopyPut || it.Op > CopyPuts, it.Op == CopyRemove && value > 0:
		err = fmt.Errorf("operation %d with %d bytes", it.Op, value)
	case key == 0 || key > maxCopyKey || value > maxCopyValue:
		err = fmt.Errorf("key of %d bytes, value of %d", key, value)
	}
	if err != nil {
		return it, src, 0, corrupt("item of the copy", "%v", err)
	}
	if all := copyItemHead + key + value; len(src) < all {
		return it, src, all, nil
	}
	src = src[copyItemHead:]
	it.Key, it.Value = src[:key:key], src[key:key+value:key+value]
	return it, src[key+value:], 0, nil
}

// Apply returns the value that the item's key has after it, in memory of its own. old is the value before it, or nil. The
// error matches ErrCorrupt. An item that removes its key makes nil.
func (it *CopyItem) Apply(old []byte) ([]byte, error) {
	switch it.Op {
	case CopyPatch:
		return ApplyPatch(make([]byte, 0, len(old)+len(it.Value)), old, it.Value)
	case CopyPuts:
		var l Leaf
		err := DecodeLeaf(old, &l)
		if err == nil {
			err = applyPuts(&l, it.Value)
		}
		if err != nil {
			return nil, err
		}
		return AppendLeaf(nil, &l), nil
	case CopyRemove:
		return nil, nil
	}
	return append(make([]byte, 0, len(it.Value)), it.Value...), nil
}
