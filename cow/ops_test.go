package cow

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// maxSnaps bounds the snapshots of a volume in the model test: each is read in each state.
const maxSnaps = 4

// administer does an operation on names.
func (w *modelStore) administer(o op, names []string, name string) error {
	v := w.m.now()[name]
	snaps := slices.Sorted(maps.Keys(v.snaps))
	kind := o.kind
	if kind == "snapshot" && len(snaps) >= maxSnaps {
		kind = "unsnap"
	}
	if kind == "clone" && len(names) >= 4 {
		kind = "remove"
	}
	if len(snaps) == 0 && (kind == "tag" || kind == "unsnap" || kind == "clone" || kind == "rollback") {
		kind = "snapshot"
	}
	var snap Ref
	if len(snaps) > 0 {
		snap = Ref{name, snaps[mix(o.b)%uint64(len(snaps))]}
	}
	switch kind {
	case "snapshot":
		return w.snapshot(o, names, name)
	case "unsnap":
		if w.pinned(snap) {
			return busy(w.s.Remove(snap, true))
		}
		w.m.remove(snap)
		return w.event(w.s.Remove(snap, o.c%2 == 0))
	case "clone":
		to := []string{w.newName("c")}
		if o.b%3 == 0 && len(names) < 3 {
			to = append(to, w.newName("c"))
		}
		w.m.clone(snap, to...)
		return w.event(w.s.Clone(snap, to...))
	case "rollback":
		w.closeDevice(name)
		w.m.rollback(snap)
		return w.event(w.s.Rollback(snap))
	case "rename":
		return w.rename(o, name, snap)
	case "tag":
		return w.tag(o, name, snap)
	case "property":
		return w.property(o, name)
	default: // remove; create where there are enough
		w.closeDevice(name)
		if w.pinned(Ref{Volume: name}) {
			return busy(w.s.Remove(Ref{Volume: name}, true))
		}
		w.m.remove(Ref{Volume: name})
		return w.event(w.s.Remove(Ref{Volume: name}, len(snaps) > 0 || o.c%2 == 0))
	}
}

// snapshot takes one of this volume and, now and then, of all in the same moment.
func (w *modelStore) snapshot(o op, names []string, name string) error {
	sn := w.newName("s")
	refs := []Ref{{name, sn}}
	if o.b%3 == 0 {
		refs = nil
		for _, n := range names {
			if len(w.m.now()[n].snaps) < maxSnaps {
				refs = append(refs, Ref{n, sn})
			}
		}
	}
	w.m.snapshot(refs...)
	return w.event(w.s.Snapshot(refs...))
}

// tag gives a snapshot, or all of its volume, a hold, or takes it away. If the holds are not as they have to be, that
// must be refused.
func (w *modelStore) tag(o op, name string, snap Ref) error {
	v, tag := w.m.now()[name], string(rune('a'+o.a%2))
	refs := []Ref{snap}
	if o.b%3 == 0 {
		refs = nil
		for _, sn := range slices.Sorted(maps.Keys(v.snaps)) {
			refs = append(refs, Ref{name, sn})
		}
	}
	release := o.c%4 > 0 // most of the time there is no hold, or the test would remove too little
	next, allowed := v, true
	for _, r := range refs {
		tags := v.holds[r.Snapshot]
		allowed = allowed && strings.Contains(tags, tag) == release
		if release {
			tags = strings.Replace(tags, tag+",", "", 1)
		} else {
			tags = strings.Join(slices.Sorted(slices.Values(append(strings.SplitAfter(tags, ","), tag+","))), "")
		}
		next = next.withHolds(r.Snapshot, tags)
	}
	do, refusal := w.s.Hold, ErrExists
	if release {
		do, refusal = w.s.Release, ErrNotFound
	}
	if !allowed {
		if err := do(tag, refs...); !errors.Is(err, refusal) {
			return fmt.Errorf("it is not refused: %v", err)
		}
		return nil
	}
	w.m.record(w.m.now().with(name, next))
	return w.event(do(tag, refs...))
}

// release takes all holds from a snapshot, or from those of a volume.
func (w *modelStore) release(r Ref) error {
	for sn, tags := range w.m.now()[r.Volume].holds {
		if r.Snapshot != "" && r.Snapshot != sn {
			continue
		}
		for tag := range strings.SplitSeq(strings.TrimSuffix(tags, ","), ",") {
			if tag == "" {
				continue
			}
			v := w.m.now()[r.Volume]
			w.m.record(w.m.now().with(r.Volume, v.withHolds(sn, strings.Replace(v.holds[sn], tag+",", "", 1))))
			if err := w.event(w.s.Release(tag, Ref{r.Volume, sn})); err != nil {
				return err
			}
		}
	}
	return nil
}

// property sets properties, or removes them.
func (w *modelStore) property(o op, name string) error {
	v := w.m.now()[name]
	changes := map[string]string{"k": fmt.Sprint(o.b % 3), string(rune('a' + o.a%3)): fmt.Sprint(o.c)}
	if o.b%4 == 0 {
		changes["k"], changes["b"] = "", ""
	}
	next := maps.Clone(v.props)
	if next == nil {
		next = map[string]string{}
	}
	maps.Copy(next, changes)
	maps.DeleteFunc(next, func(_, value string) bool { return value == "" })
	if !maps.Equal(next, v.props) {
		v.props = next
		w.m.record(w.m.now().with(name, v))
	}
	return w.event(w.s.SetProperties(name, changes))
}

func (w *modelStore) rename(o op, name string, snap Ref) error {
	from, to := Ref{Volume: name}, Ref{Volume: w.newName("r")}
	if o.c%2 == 0 && snap.Volume != "" {
		from, to = snap, Ref{name, to.Volume}
	}
	if h := w.m.now().hidden(); from.Snapshot == "" && h != "" && w.m.now()[h].hidden.target.Volume == name {
		return busy(w.s.Rename(from, to))
	}
	w.m.rename(from, to)
	if err := w.event(w.s.Rename(from, to)); err != nil {
		return err
	}
	if d := w.devs[name]; d != nil && from.Snapshot == "" {
		delete(w.devs, name)
		w.devs[to.Volume] = d
	}
	return nil
}

// scrub makes a whole scrub. It makes nothing durable for sure.
func (w *modelStore) scrub() error {
	run, err := w.s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	if err == nil && run.Damaged > 0 { // what the disk fails to read, it counts as unreadable
		err = fmt.Errorf("scrub: %+v", run)
	}
	return err
}

func (w *modelStore) resize(o op, name string, v modelVolume) error {
	size := 512 + int64(mix(o.b))%(2<<20)/512*512
	if o.c%4 > 0 {
		size = max(512, v.size+int64(o.c%64)*512-16<<10) // often a little
	}
	if size < v.size {
		w.closeDevice(name)
	}
	w.m.resize(name, size)
	return w.event(w.s.Resize(name, size, true))
}

// misuse tries what must be refused; the caller sees that nothing has been logged.
func (w *modelStore) misuse(name string) error {
	d, err := w.device(name)
	if err != nil {
		return err
	}
	r := Ref{Volume: name}
	size := d.Size()
	_, again := w.s.OpenDevice(r, false)
	_, missing := w.s.OpenDevice(Ref{name, "missing"}, true)
	_, beyond := d.WriteAt(make([]byte, 513), size-512)
	_, create := w.s.CreateVolume(name, VolumeOptions{Size: 512})
	wants := []struct {
		what      string
		got, want error
	}{
		{"second writer", again, ErrBusy},
		{"missing snapshot", missing, ErrNotFound},
		{"write behind the end", beyond, ErrInvalid},
		{"discard behind the end", d.Discard(size, 1), ErrInvalid},
		{"create what exists", create, ErrExists},
		{"remove what is open", w.s.Remove(r, true), ErrBusy},
		{"cut off what is open", w.s.Resize(name, size-512, true), ErrBusy},
		{"shrink by mistake", w.s.Resize(name, size-512, false), ErrInvalid},
		{"rename to itself's kind", w.s.Rename(r, Ref{name, "x"}), ErrInvalid},
		{"clone of nothing", w.s.Clone(Ref{name, "missing"}, "x"), ErrNotFound},
		{"rollback to nothing", w.s.Rollback(Ref{name, "missing"}), ErrNotFound},
	}
	if size == 512 {
		wants = slices.Delete(wants, 6, 8) // a size of 0 is refused before
	}
	for sn := range w.m.now()[name].snaps {
		wants = append(wants, []struct {
			what      string
			got, want error
		}{
			{"snapshot again", w.s.Snapshot(Ref{name, sn}), ErrExists},
			{"clone over a volume", w.s.Clone(Ref{name, sn}, name), ErrExists},
			{"roll back what is open", w.s.Rollback(Ref{name, sn}), ErrBusy},
		}...)
		break
	}
	for _, c := range wants {
		if !errors.Is(c.got, c.want) {
			return fmt.Errorf("%s: %v, not %v", c.what, c.got, c.want)
		}
	}
	return nil
}
