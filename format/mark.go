package format

const (
	markMagic = "VDISKDUR"

	// DurableMarkSize is the size in bytes of an encoded durable mark.
	DurableMarkSize = 64
)

// DurableMark says how far the log of a store is durable (docs/format.md, Durable mark).
type DurableMark struct {
	// UUID is the id of the store.
	UUID [16]byte
	// Seq is a sequence number: every record before it was durable when the mark was written.
	Seq uint64
}

// Encode writes the mark to the first DurableMarkSize bytes of dst. It panics if dst is shorter.
func (m *DurableMark) Encode(dst []byte) {
	dst = dst[:DurableMarkSize]
	clear(dst)
	copy(dst[4:], markMagic)
	le.PutUint32(dst[12:], layoutVersion)
	copy(dst[16:], m.UUID[:])
	le.PutUint64(dst[32:], m.Seq)
	le.PutUint32(dst, Checksum(dst[4:]))
}

// DecodeDurableMark decodes the mark at the front of src. The error matches ErrCorrupt or ErrVersion.
func DecodeDurableMark(src []byte) (DurableMark, error) {
	const what = "durable mark"
	var m DurableMark
	if len(src) < DurableMarkSize {
		return m, corrupt(what, "%d bytes, want %d", len(src), DurableMarkSize)
	}
	src = src[:DurableMarkSize]
	if string(src[4:12]) != markMagic {
		return m, corrupt(what, "magic %q", src[4:12])
	}
	if got, want := Checksum(src[4:]), le.Uint32(src); got != want {
		return m, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	if err := checkVersion(what, int(le.Uint32(src[12:])), layoutVersion); err != nil {
		return m, err
	}
	copy(m.UUID[:], src[16:32])
	m.Seq = le.Uint64(src[32:])
	return m, nil
}
