package cow

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/vdisk/vdisk/format"
)

// The model of a store: what it holds after each record of its log, as plain blocks in memory. It knows how an
// operation is cut into records (docs/engine.md, Writing) and nothing of how they are stored, so the state that a crash
// left can be compared with exactly the state that it should be.

// block is one block's content; nil is zeros. It never changes once made.
type block = *[format.BlockSize]byte

// solid is zeros that are no hole.
var solid = new([format.BlockSize]byte)

// disk is the content of a volume or snapshot. It never changes once made.
type disk struct {
	size   int64
	blocks []block
}

// modelVolume is a volume and its snapshots by name. It never changes once made.
type modelVolume struct {
	disk
	codec  format.Codec
	snaps  map[string]disk
	holds  map[string]string // the tags of each snapshot, which a comma ends
	props  map[string]string
	hidden *hidden // it is being received
}

// state is the volumes by name. It never changes once made.
type state map[string]modelVolume

func (st state) with(name string, v modelVolume) state {
	next := maps.Clone(st)
	next[name] = v
	return next
}

func (st state) without(name string) state {
	next := maps.Clone(st)
	delete(next, name)
	return next
}

func (v modelVolume) withSnap(name string, d disk) modelVolume {
	v.snaps = maps.Clone(v.snaps)
	v.snaps[name] = d
	return v
}

func (v modelVolume) withoutSnap(name string) modelVolume {
	v.snaps, v.holds = maps.Clone(v.snaps), maps.Clone(v.holds)
	delete(v.snaps, name)
	delete(v.holds, name)
	return v
}

func (v modelVolume) withHolds(name, tags string) modelVolume {
	if v.holds = maps.Clone(v.holds); v.holds == nil {
		v.holds = map[string]string{}
	}
	v.holds[name] = tags
	return v
}

func (d disk) with(first uint64, bs []block) disk {
	d.blocks = slices.Clone(d.blocks)
	copy(d.blocks[first:], bs)
	return d
}

func (d disk) resized(size int64) disk {
	blocks := make([]block, blocksOf(size))
	copy(blocks, d.blocks)
	return disk{size, blocks}
}

// read copies the content of whole blocks from first on into p.
func (d disk) read(p []byte, first uint64) {
	for i := uint64(0); len(p) > 0; i++ {
		if b := d.blocks[first+i]; b != nil {
			p = p[copy(p, b[:]):]
		} else {
			clear(p[:min(len(p), format.BlockSize)])
			p = p[min(len(p), format.BlockSize):]
		}
	}
}

// model is the history of a store since some record.
type model struct {
	base   uint64  // number of the record that follows states[0]
	states []state // states[i] is after record base+i-1
}

func newModel(base uint64, st state) *model { return &model{base, []state{st}} }

func (m *model) now() state   { return m.states[len(m.states)-1] }
func (m *model) next() uint64 { return m.base + uint64(len(m.states)) - 1 }

// record adds the state after one more record.
func (m *model) record(st state) { m.states = append(m.states, st) }

// at is the state when seq is the number of the next record.
func (m *model) at(seq uint64) (state, bool) {
	if seq < m.base || seq > m.next() {
		return nil, false
	}
	return m.states[seq-m.base], true
}

// forget drops the states before seq, which can never come back.
func (m *model) forget(seq uint64) {
	if n := seq - m.base; seq > m.base && n < uint64(len(m.states)) {
		m.states, m.base = slices.Clone(m.states[n:]), seq
	}
}

// fork is an independent model with the same history.
func (m *model) fork() *model { return &model{m.base, slices.Clip(m.states)} }

// truncate drops the states after seq: a crash lost them.
func (m *model) truncate(seq uint64) { m.states = slices.Clip(m.states[:seq-m.base+1]) }

// put is a record of n blocks of a volume; a hole over holes is none.
func (m *model) put(name string, first uint64, bs []block) {
	v := m.now()[name]
	if allNil(bs) && allNil(v.blocks[first:first+uint64(len(bs))]) {
		return
	}
	v.disk = v.with(first, bs)
	m.record(m.now().with(name, v))
}

func allNil(bs []block) bool { return !slices.ContainsFunc(bs, func(b block) bool { return b != nil }) }

func (m *model) write(name string, p []byte, off int64) { m.writeZeros(name, p, off, nil) }

// writeZeros is write where zeros become what is given: holes, or solid.
func (m *model) writeZeros(name string, p []byte, off int64, zero block) {
	for len(p) > 0 {
		n := int(min(int64(len(p)), hotUnit-off%hotUnit))
		m.writeUnit(name, p[:n], off, zero)
		p, off = p[n:], off+int64(n)
	}
}

// writeUnit is a record for each run of blocks with data, if they compress, or else for each block, and for each run of
// zeros, or for each block of them if they are solid.
func (m *model) writeUnit(name string, p []byte, off int64, zero block) {
	first, skip := uint64(off/format.BlockSize), int(off%format.BlockSize)
	data := make([]byte, blocksOf(int64(skip+len(p)))*format.BlockSize)
	m.now()[name].read(data, first)
	copy(data[skip:], p)
	bs := toBlocks(data)
	for i := range bs {
		if bs[i] == nil {
			bs[i] = zero
		}
	}
	for len(bs) > 0 {
		n := 1
		for n < len(bs) && (bs[n] == zero) == (bs[0] == zero) {
			n++
		}
		step := n
		if bs[0] == solid || bs[0] != nil && !shrinks(m.now()[name].codec, data[:n*format.BlockSize]) {
			step = 1
		}
		for i := 0; i < n; i += step {
			m.put(name, first+uint64(i), bs[i:i+step])
		}
		bs, data, first = bs[n:], data[n*format.BlockSize:], first+uint64(n)
	}
}

// shrinks reports whether a unit is stored compressed.
func shrinks(c format.Codec, unit []byte) bool {
	pool := compressors()[c]
	comp := pool.get()
	defer pool.put(comp)
	_, as := comp.Compress(make([]byte, 0, format.MaxCompressed), unit)
	return as != format.Raw
}

var compressors = sync.OnceValue(func() map[format.Codec]*codecPool {
	pools := map[format.Codec]*codecPool{}
	for _, c := range []format.Codec{format.Raw, format.S2, format.Zstd} {
		pool, err := newCodecPool(c, 0)
		if err != nil {
			panic(err)
		}
		pools[c] = pool
	}
	return pools
})

func toBlocks(data []byte) []block {
	bs := make([]block, len(data)/format.BlockSize)
	for i := range bs {
		if b := block(data[i*format.BlockSize:]); *b != [format.BlockSize]byte{} {
			bs[i] = b
		}
	}
	return bs
}

// punch is a hole a leaf.
func (m *model) punch(name string, first, end uint64) {
	for first < end {
		n := min(end-first, format.LeafBlocks-first%format.LeafBlocks)
		m.put(name, first, make([]block, n))
		first += n
	}
}

func (m *model) discard(name string, off, length int64) {
	end := uint64(off+length) / format.BlockSize
	if off+length == m.now()[name].size {
		end = blocksOf(off + length)
	}
	m.punch(name, blocksOf(off), end)
}

func (m *model) zero(name string, off, length int64, noHole bool) {
	if noHole {
		m.writeZeros(name, make([]byte, length), off, solid)
		return
	}
	first, end := blocksOf(off), uint64(off+length)/format.BlockSize
	if first >= end {
		m.write(name, make([]byte, length), off)
		return
	}
	m.write(name, make([]byte, int64(first)*format.BlockSize-off), off)
	m.punch(name, first, end)
	m.write(name, make([]byte, off+length-int64(end)*format.BlockSize), int64(end)*format.BlockSize)
}

func (m *model) create(name string, size int64, c format.Codec) {
	m.record(m.now().with(name, modelVolume{disk: disk{}.resized(size), codec: c}))
}

func (m *model) snapshot(refs ...Ref) {
	st := m.now()
	for _, r := range refs {
		v := st[r.Volume]
		if v.snaps == nil {
			v.snaps = map[string]disk{}
		}
		st = st.with(r.Volume, v.withSnap(r.Snapshot, v.disk))
	}
	m.record(st)
}

func (m *model) clone(src Ref, names ...string) {
	st := m.now()
	for _, name := range names {
		st = st.with(name, modelVolume{disk: m.now()[src.Volume].snaps[src.Snapshot], codec: m.now()[src.Volume].codec})
	}
	m.record(st)
}

func (m *model) rollback(to Ref) {
	v := m.now()[to.Volume]
	v.disk = v.snaps[to.Snapshot]
	m.record(m.now().with(to.Volume, v))
}

func (m *model) rename(from, to Ref) {
	v := m.now()[from.Volume]
	if from.Snapshot == "" {
		m.record(m.now().without(from.Volume).with(to.Volume, v))
		return
	}
	v = v.withSnap(to.Snapshot, v.snaps[from.Snapshot]).withHolds(to.Snapshot, v.holds[from.Snapshot]).withoutSnap(from.Snapshot)
	m.record(m.now().with(from.Volume, v))
}

func (m *model) remove(r Ref) {
	if r.Snapshot == "" {
		m.record(m.now().without(r.Volume))
		return
	}
	m.record(m.now().with(r.Volume, m.now()[r.Volume].withoutSnap(r.Snapshot)))
}

func (m *model) resize(name string, size int64) {
	old := m.now()[name].size
	if size == old {
		return
	}
	if size < old {
		m.zero(name, size, old-size, false)
	}
	v := m.now()[name]
	v.disk = v.resized(size)
	m.record(m.now().with(name, v))
}

// same compares what a store says and holds with a state.
func same(s *Store, st state, buf []byte) error {
	vols := s.Volumes()
	if len(vols) != len(st) {
		return fmt.Errorf("there are %d volumes, not %d", len(vols), len(st))
	}
	for _, in := range vols {
		v, ok := st[in.Name]
		if !ok {
			return fmt.Errorf("there is a volume %s", in.Name)
		}
		if (in.Receiving != nil) != (v.hidden != nil) || v.hidden != nil && in.Receiving.Mark != v.hidden.mark {
			return fmt.Errorf("%s: %+v is being received, not %v", in.Name, in.Receiving, v.hidden)
		}
		if err := sameDisk(s, Ref{Volume: in.Name}, in.Size, v.disk, buf); err != nil {
			return err
		}
		if !maps.Equal(in.Properties, v.props) {
			return fmt.Errorf("%s has the properties %v, not %v", in.Name, in.Properties, v.props)
		}
		if len(in.Snapshots) != len(v.snaps) {
			return fmt.Errorf("%s has %d snapshots, not %d", in.Name, len(in.Snapshots), len(v.snaps))
		}
		for _, sn := range in.Snapshots {
			d, ok := v.snaps[sn.Name]
			if !ok {
				return fmt.Errorf("there is a snapshot %s of %s", sn.Name, in.Name)
			}
			if tags := tagsOf(sn); tags != v.holds[sn.Name] {
				return fmt.Errorf("%s@%s has the holds %q, not %q", in.Name, sn.Name, tags, v.holds[sn.Name])
			}
			if err := sameDisk(s, Ref{in.Name, sn.Name}, sn.Size, d, buf); err != nil {
				return err
			}
		}
	}
	return nil
}

func tagsOf(sn SnapshotInfo) (tags string) {
	for _, h := range sn.Holds {
		tags += h.Tag + ","
	}
	return tags
}

func sameDisk(s *Store, r Ref, size int64, want disk, buf []byte) (err error) {
	if size != want.size {
		return fmt.Errorf("%s has the size %d, not %d", r, size, want.size)
	}
	d, err := s.OpenDevice(r, true)
	if errors.Is(err, ErrBusy) { // only the test opens what is being received
		d, err = openHidden(s, r.Volume), nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := sameRange(d, 0, size, want, buf); err != nil {
		return err
	}
	// A stretch of it in parts of units, which may be in memory from an earlier look.
	s.mu.Lock()
	from := int64(s.wal.NextSeq()%uint64(len(want.blocks))) * format.BlockSize
	s.mu.Unlock()
	return sameRange(d, from, min(size, from+format.UnitSize), want, buf[:format.BlockSize])
}

// sameRange compares the bytes from a block on, up to end, as many at a time as buf has.
func sameRange(d *Device, off, end int64, want disk, buf []byte) error {
	for ; off < end; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), end-off)]
		if _, err := d.ReadAt(p, off); err != nil {
			return err
		}
		if at := differ(p, want.blocks[off/format.BlockSize:]); at >= 0 {
			return fmt.Errorf("%s differs at byte %d", d.Ref(), off+int64(at))
		}
	}
	return nil
}

// differ is the first byte of p that is not as in bs, or -1.
func differ(p []byte, bs []block) int {
	for i := 0; i*format.BlockSize < len(p); i++ {
		part := p[i*format.BlockSize : min(len(p), (i+1)*format.BlockSize)]
		want := zeros[:len(part)]
		if bs[i] != nil {
			want = bs[i][:len(part)]
		}
		if !bytes.Equal(part, want) {
			for j := range part {
				if part[j] != want[j] {
					return i*format.BlockSize + j
				}
			}
		}
	}
	return -1
}
