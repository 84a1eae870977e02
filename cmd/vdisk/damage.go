package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// lostJSON is a range of a volume or snapshot that cannot be read, in the JSON output.
type lostJSON struct {
	Name   string `json:"name"` // VOL or VOL@SNAP
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
}

func lostOf(list []cow.Lost) []lostJSON {
	js := []lostJSON{}
	for _, l := range list {
		js = append(js, lostJSON{l.Ref.String(), l.Offset, l.Length})
	}
	return js
}

// lostText names ranges, as NAME OFFSET+LENGTH.
func lostText(list []lostJSON) string {
	var text []string
	for _, l := range list {
		text = append(text, fmt.Sprintf("%s %d+%d", l.Name, l.Offset, l.Length))
	}
	return strings.Join(text, ", ")
}

// inRanges says how much is in ranges.
func inRanges(rs sparse.Ranges) string {
	if len(rs) == 1 {
		return fmt.Sprintf("%d bytes at %d", rs[0].Length, rs[0].Offset)
	}
	return fmt.Sprintf("%d bytes in %d ranges", rs.Bytes(), len(rs))
}

// damageJSON is a damaged record or leaf in the JSON output.
type damageJSON struct {
	Where string     `json:"where"`
	Why   string     `json:"why"`
	Lost  []lostJSON `json:"lost"` // of all that share it
}

// sharedDamage returns the damage that the owner knows in one of the volumes and snapshots, with all that share it.
func sharedDamage(ctx context.Context, s owner.Store, refs ...cow.Ref) (list []damageJSON, err error) {
	k, err := s.Damage(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range k.List {
		if slices.ContainsFunc(d.Lost, func(l cow.Lost) bool { return slices.Contains(refs, l.Ref) }) {
			list = append(list, damageJSON{d.Where, d.Why, lostOf(d.Lost)})
		}
	}
	return list, nil
}

// noteDamage prints damage for people.
func (a *app) noteDamage(list []damageJSON) {
	for _, d := range list {
		a.note("damaged is %s (%s): it takes %s", d.Where, d.Why, lostText(d.Lost))
	}
}

// addDamage adds what is known to be damaged to a volume and its snapshots.
func addDamage(ctx context.Context, s owner.Store, j *volumeJSON) error {
	type damaged struct {
		bytes    *int64
		notKnown *[]lostJSON
	}
	refs, of := []cow.Ref{{Volume: j.Name}}, map[cow.Ref]damaged{}
	j.DamagedBytes = new(int64)
	of[refs[0]] = damaged{j.DamagedBytes, &j.NotKnown}
	for i := range j.Snapshots {
		sn := &j.Snapshots[i]
		r, err := cow.ParseRef(sn.Name)
		if err != nil {
			return err
		}
		sn.DamagedBytes = new(int64)
		refs, of[r] = append(refs, r), damaged{sn.DamagedBytes, &sn.NotKnown}
	}
	k, err := s.Damage(ctx, refs...)
	if err != nil {
		return err
	}
	for _, d := range k.List {
		for _, l := range d.Lost {
			by := of[l.Ref]
			if *by.bytes += l.Length; d.Map {
				*by.notKnown = append(*by.notKnown, lostOf([]cow.Lost{l})...)
			}
		}
	}
	return nil
}

// damageFields returns the fields that say how much is damaged, and where the map cannot be read, if anything is known to
// be.
func damageFields(a *app, n *int64, notKnown []lostJSON) (f [][2]string) {
	if *n > 0 {
		f = append(f, [2]string{"damaged", a.size(*n) + ", as far as it was met; 'vdisk check --read-data' names all of it"})
	}
	if len(notKnown) > 0 {
		f = append(f, [2]string{"not known", lostText(notKnown) + ": the map cannot be read there"})
	}
	return f
}
