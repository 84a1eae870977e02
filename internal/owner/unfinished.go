package owner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
)

// unfinishedName is the file in a store that lists the volumes that imports are filling and measurements are writing
// to. A killed process leaves such volumes, and the next owner removes them. Their names alone do not identify them,
// since a user may give a volume any name. A volume is listed before it is made, and until it is finished or gone, so
// that there is no moment at which a kill leaves one that is not listed.
const unfinishedName = "importing"

// unfinished maintains the file.
type unfinished struct {
	in   *storage.Folder
	mu   sync.Mutex // guards list and the file
	list []unfinishedVolume
}

// unfinishedVolume identifies a volume by its name and creation time, so that it is not confused with an earlier or
// later volume of that name.
type unfinishedVolume struct {
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	Scratch bool      `json:"scratch,omitempty"` // made by a measurement; its snapshots are removed with it
}

func (u *unfinished) write() error {
	if len(u.list) == 0 {
		if err := u.in.Remove(unfinishedName); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(u.list)
	if err != nil {
		return err
	}
	return u.in.Replace(unfinishedName, append(text, '\n'), true)
}

// add records that a volume, which is about to be made, is useless until it is finished. It returns the time of creation
// that the volume must get.
func (u *unfinished) add(name string, scratch bool) (created time.Time, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	created = cow.Now()
	u.list = append(u.list, unfinishedVolume{name, created, scratch})
	if err := u.write(); err != nil {
		u.list = u.list[:len(u.list)-1]
		return created, fmt.Errorf("noting that volume %s is unfinished: %w", name, err)
	}
	return created, nil
}

// addUnfinished is unfinished.add, unless the store can only be read.
func (o *Owner) addUnfinished(name string, scratch bool) (created time.Time, err error) {
	if err := o.ReadOnly(); err != nil {
		return created, err
	}
	return o.unfinished.add(name, scratch)
}

// done records that a volume is finished or gone, or was not made.
func (u *unfinished) done(name string, created time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.list = slices.DeleteFunc(u.list, func(x unfinishedVolume) bool { return x.Name == name && x.Created.Equal(created) })
	return u.write()
}

// noLonger records that a volume is no longer unfinished, unless it is still there, or may be: then the next owner tries
// again to remove it.
func (o *Owner) noLonger(name string, created time.Time) {
	if v, err := o.store.Volume(name); err == nil && v.Created.Equal(created) || err != nil && !errors.Is(err, cow.ErrNotFound) {
		return
	}
	// The volume no longer exists under that name, so a leftover note is harmless.
	if err := o.unfinished.done(name, created); err != nil {
		o.opts.Logger.Warn("noting which volumes are unfinished", "err", err)
	}
}

func (x unfinishedVolume) is(v cow.VolumeInfo) bool {
	return x.Name == v.Name && x.Created.Equal(v.Created)
}

// removeUnfinished removes the volumes that imports and measurements of an earlier owner left unfinished. If one cannot
// be removed now, because the store is full or the volume has snapshots, the next owner tries again.
func (o *Owner) removeUnfinished() {
	u := &o.unfinished
	u.mu.Lock()
	defer u.mu.Unlock()
	text, err := u.in.Read(unfinishedName)
	if errors.Is(err, fs.ErrNotExist) {
		return // the usual case
	}
	if err == nil {
		err = json.Unmarshal(text, &u.list)
	}
	if err != nil {
		o.opts.Logger.Warn("it is not known which volumes were left unfinished", "file", u.in.Join(unfinishedName), "err", err)
		return
	}
	u.list = slices.DeleteFunc(u.list, func(x unfinishedVolume) bool {
		v, err := o.store.Volume(x.Name)
		if errors.Is(err, cow.ErrNotFound) || err == nil && !x.is(v) {
			return true // it was finished, or removed
		}
		if err == nil {
			err = o.store.Remove(cow.Ref{Volume: x.Name}, x.Scratch)
		}
		if err != nil {
			o.opts.Logger.Warn("removing the volume of a killed import or measurement", "volume", x.Name, "err", err)
			return false
		}
		o.opts.Logger.Info("removed the volume of a killed import or measurement", "volume", x.Name)
		return true
	})
	if err := u.write(); err != nil {
		o.opts.Logger.Warn("noting which volumes are unfinished", "err", err)
	}
}
