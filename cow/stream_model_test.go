package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/stream"
)

// hidden is what the model knows of a volume that is being received.
type hidden struct {
	target     Ref
	guid, base format.GUID
	file       []byte // the whole stream
	header     format.StreamHeader
	mark       uint64
	codec      format.Codec // of the volume that the target becomes
	from       disk         // the base
}

// names are the volumes that can be used, in order.
func (st state) names() (names []string) {
	for _, name := range slices.Sorted(maps.Keys(st)) {
		if st[name].hidden == nil {
			names = append(names, name)
		}
	}
	return names
}

// hidden is the name of the volume that is being received, or empty.
func (st state) hidden() string {
	for name, v := range st {
		if v.hidden != nil {
			return name
		}
	}
	return ""
}

// openHidden opens a hidden volume to read, which nobody else can.
func openHidden(s *Store, name string) *Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.catalog.byName[name]
	v.readers++
	return &Device{s: s, ref: Ref{Volume: name}, v: v, b: v.branch, asOf: head, readOnly: true, block: v.LogicalBlock}
}

// guidIn is the GUID of a snapshot.
func (w *modelStore) guidIn(r Ref) format.GUID {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.s.guidOf(w.s.catalog.byName[r.Volume].snapshots[r.Snapshot])
}

// pinned reports whether a volume or snapshot cannot be removed because of holds, or of what is being received.
func (w *modelStore) pinned(r Ref) bool {
	st := w.m.now()
	for sn, tags := range st[r.Volume].holds {
		if tags != "" && (r.Snapshot == "" || r.Snapshot == sn) {
			return true
		}
	}
	h := st[st.hidden()].hidden
	if h == nil {
		return false
	}
	if r.Snapshot != "" {
		return w.guidIn(r) == h.base
	}
	for sn := range st[r.Volume].snaps {
		if w.guidIn(Ref{r.Volume, sn}) == h.base {
			return true
		}
	}
	return r.Volume == h.target.Volume
}

// busy is the error of an operation that must be refused.
func busy(err error) error {
	if !errors.Is(err, ErrBusy) {
		return fmt.Errorf("it is not refused: %v", err)
	}
	return nil
}

// send sends a snapshot and receives it in the same store, whole or cut. If something is being received, it goes on with
// that, or gives it up.
func (w *modelStore) send(o op, names []string) error {
	st := w.m.now()
	if name := st.hidden(); name != "" {
		h := st[name].hidden
		if o.b%4 == 0 {
			return w.abort()
		}
		return w.receive(o, name, ReceiveOptions{Target: h.target, Force: true}, h)
	}
	var snaps []Ref
	for _, r := range st.refs() {
		if r.Snapshot != "" {
			snaps = append(snaps, r)
		}
	}
	if len(snaps) == 0 {
		return w.snapshot(op{b: 1}, names, names[mix(o.a)%uint64(len(names))])
	}
	so := SendOptions{Snapshot: snaps[mix(o.a)%uint64(len(snaps))], frameBytes: 4 << 10, markBytes: 16 << 10}
	ro := ReceiveOptions{Target: Ref{w.newName("t"), w.newName("s")}}
	base := snaps[mix(o.b)%uint64(len(snaps))]
	target := names[mix(o.c)%uint64(len(names))]
	switch {
	case o.b%3 == 0: // the target becomes another, from its head or from anywhere
		if len(st[target].snaps) >= maxSnaps || w.has(target, so.Snapshot) {
			return nil
		}
		ro.Target.Volume = target
		if ro.Force = o.c%4 == 0; !ro.Force {
			base = Ref{target, w.newName("s")}
			w.m.snapshot(base)
			if err := w.event(w.s.Snapshot(base)); err != nil {
				return err
			}
		}
		so.Base = base
	case len(names) >= 4:
		return nil
	case o.b%3 == 1:
		so.Base = base
	}
	if so.Base.Volume != "" && w.guidIn(so.Base) == w.guidIn(so.Snapshot) {
		return nil
	}
	h, err := w.sent(so, ro)
	if err != nil {
		return err
	}
	return w.receive(o, receivingName(ro.Target.Volume), ro, h)
}

// abort gives up what is being received, if anything is.
func (w *modelStore) abort() error {
	st := w.m.now()
	name := st.hidden()
	if name == "" {
		return nil
	}
	w.m.record(st.without(name))
	return w.event(w.s.Abort(st[name].hidden.target.Volume))
}

// has reports whether a volume has a snapshot with the content of another.
func (w *modelStore) has(name string, r Ref) bool {
	for sn := range w.m.now()[name].snaps {
		if w.guidIn(Ref{name, sn}) == w.guidIn(r) {
			return true
		}
	}
	return false
}

// sent sends a snapshot, and compares what the stream makes of the base with the model.
func (w *modelStore) sent(so SendOptions, ro ReceiveOptions) (*hidden, error) {
	var out bytes.Buffer
	if _, err := w.s.Send(context.Background(), so, &out); err != nil {
		return nil, err
	}
	st := w.m.now()
	h := &hidden{target: ro.Target, guid: w.guidIn(so.Snapshot), file: out.Bytes(), codec: st[so.Snapshot.Volume].codec}
	want, is := st.disk(so.Snapshot), disk{}.resized(st.disk(so.Snapshot).size)
	if so.Base.Volume != "" {
		h.base, h.from = w.guidIn(so.Base), st.disk(so.Base)
		is = h.from.resized(want.size)
	}
	if v, ok := st[ro.Target.Volume]; ok {
		h.codec = v.codec
	}
	frames, header, err := framesOf(h.file)
	if err != nil {
		return nil, err
	}
	for _, f := range frames {
		for _, it := range f.items {
			is = is.with(it.first, it.blocks)
		}
	}
	for i := range want.blocks {
		if !sameContent(want.blocks[i], is.blocks[i]) {
			return nil, fmt.Errorf("%v to %v: the stream says something else of block %d", so.Base, so.Snapshot, i)
		}
	}
	h.header = header
	return h, nil
}

// modelFrame is a frame as blocks.
type modelFrame struct {
	items []modelItem
	block uint64 // of a mark
	end   bool
}

type modelItem struct {
	first  uint64
	blocks []block
}

// framesOf decodes a stream, as far as it goes. A stream that is cut is no error.
func framesOf(file []byte) (frames []modelFrame, h format.StreamHeader, err error) {
	r := stream.NewReader(bytes.NewReader(file))
	h, err = r.Next()
	for err == nil {
		var f stream.Frame
		if f, err = r.Frame(); err != nil {
			break
		}
		one := modelFrame{block: f.Mark.Block, end: f.Kind == format.FrameEnd}
		for _, it := range f.Items {
			bs := make([]block, it.Blocks)
			if !it.IsHole() {
				data := make([]byte, it.Blocks*format.BlockSize)
				if err := format.Decompress(it.Codec, data, it.Unit); err != nil {
					return nil, h, err
				}
				for i, b := range toBlocks(data) {
					if bs[i] = b; b == nil {
						bs[i] = solid
					}
				}
			}
			one.items = append(one.items, modelItem{it.First, bs})
		}
		frames = append(frames, one)
	}
	if !errors.Is(err, stream.ErrCut) && (len(frames) == 0 || !frames[len(frames)-1].end) {
		return nil, h, err
	}
	return frames, h, nil
}

// receive receives a stream. Its end may be cut off.
func (w *modelStore) receive(o op, name string, ro ReceiveOptions, h *hidden) error {
	file := h.file
	if o.a%3 > 0 {
		file = file[:1+mix(o.c)%uint64(len(file)-1)]
	}
	if w.devs[h.target.Volume] != nil {
		w.closeDevice(h.target.Volume)
	}
	whole, err := w.m.receive(name, h, file)
	if err != nil {
		return err
	}
	_, err = w.s.Receive(context.Background(), bytes.NewReader(file), ro)
	if whole {
		return w.event(err)
	}
	if !errors.Is(err, stream.ErrCut) {
		return fmt.Errorf("it does not say that the stream is cut: %v", err)
	}
	first, ferr := format.DecodeFrame(h.file)
	if ferr != nil || len(file) < format.FrameHeaderSize+first.Length {
		return ferr // of a stream without its header nobody knows what it goes on with
	}
	var resumable *ReceiveError
	// Without the header nobody knows what it is.
	if v, ok := w.m.now()[name]; ok && hasHeader(file) && (!errors.As(err, &resumable) || resumable.Mark != v.hidden.mark) {
		return fmt.Errorf("the mark is %d: %v", v.hidden.mark, err)
	}
	return nil
}

// hasHeader reports whether a stream that may be cut has its first frame.
func hasHeader(file []byte) bool {
	if len(file) < format.FrameHeaderSize {
		return false
	}
	first, err := format.DecodeFrame(file[:format.FrameHeaderSize])
	return err == nil && len(file) >= format.FrameHeaderSize+first.Length
}

// receive is what the records of a reception do. It reports whether the stream is whole.
func (m *model) receive(name string, h *hidden, file []byte) (whole bool, err error) {
	if !hasHeader(file) {
		return false, nil
	}
	frames, _, err := framesOf(file)
	if err != nil {
		return false, err
	}
	if _, ok := m.now()[name]; !ok {
		d := h.from.resized(max(h.from.size, h.header.Size))
		begun := *h
		props := h.header.Properties
		if _, ok := m.now()[h.target.Volume]; ok {
			props = nil
		}
		m.record(m.now().with(name, modelVolume{disk: d, codec: h.codec, props: props, hidden: &begun}))
	}
	for _, f := range frames {
		for _, it := range f.items {
			m.put(name, it.first, it.blocks)
		}
		v := m.now()[name]
		if f.block > v.hidden.mark {
			marked := *v.hidden
			marked.mark = f.block
			v.hidden = &marked
			m.record(m.now().with(name, v))
		}
		if f.end {
			m.received(name)
			return true, nil
		}
	}
	return false, nil
}

// received is the end of a reception.
func (m *model) received(name string) {
	v := m.now()[name]
	h := v.hidden
	m.punch(name, blocksOf(h.header.Size), blocksOf(v.size))
	st := m.now()
	d := st[name].disk.resized(h.header.Size)
	target, ok := st[h.target.Volume]
	if !ok {
		target = modelVolume{codec: h.codec, props: h.header.Properties, snaps: map[string]disk{}}
	}
	target.disk = d
	if target.snaps == nil {
		target.snaps = map[string]disk{}
	}
	m.record(st.without(name).with(h.target.Volume, target.withSnap(h.target.Snapshot, d)))
}
