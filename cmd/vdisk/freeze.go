package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/freeze"
	"github.com/vdisk/vdisk/internal/owner"
)

// freezeFlags are the flags of snapshot for frozen file systems.
func freezeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "freeze", Usage: "freeze the file system at `MOUNTPOINT` until the snapshots are taken; may be given several times"},
		&cli.DurationFlag{Name: "freeze-timeout", Usage: "thaw after `DURATION`, and fail", Value: 10 * time.Second},
	}
}

// frozen calls take, which takes the wanted snapshots, while the file systems of --freeze are frozen. If they were
// not frozen to the end, there are no snapshots, or the error says that there may be. A ref without a snapshot stands for
// one that is named when it is taken.
func (a *app) frozen(c *cli.Context, s owner.Store, wanted []cow.Ref, take func(context.Context) ([]cow.Ref, error)) error {
	paths, limit := c.StringSlice("freeze"), c.Duration("freeze-timeout")
	if len(paths) == 0 && c.IsSet("freeze-timeout") {
		return usageError{c, errors.New("--freeze-timeout goes with --freeze")}
	}
	if len(paths) == 0 || len(wanted) == 0 {
		_, err := take(c.Context)
		return err
	}
	if limit <= 0 {
		return usageError{c, fmt.Errorf("--freeze-timeout %v is not above zero", limit)}
	}
	if err := mayTake(c, s, wanted); err != nil {
		return err
	}
	volumes := volumesOf(wanted)
	for _, path := range paths {
		if err := a.mayFreeze(c, s, path, volumes); err != nil {
			return fmt.Errorf("freezing %s: %w", path, err)
		}
	}
	var taken []cow.Ref
	unanswered := false
	err := freeze.During(c.Context, a.freezer, paths, limit, func(ctx context.Context) error {
		refs, err := take(ctx)
		if err == nil { // otherwise they may be those of somebody else
			taken = refs
		}
		unanswered = errors.As(err, &owner.UnansweredError{})
		return err
	})
	if unanswered && err != nil {
		return unknown(wanted, err)
	}
	if !errors.Is(err, freeze.ErrThawed) || len(taken) == 0 {
		return err
	}
	// They are this command's own, so it takes them back; also if a signal has ended it meanwhile.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), takeBack)
	defer cancel()
	var targets []cow.PruneTarget
	for _, r := range taken {
		targets = append(targets, cow.PruneTarget{Ref: r})
	}
	r, perr := s.Prune(ctx, false, targets...)
	if perr != nil || len(r.Kept) > 0 {
		return errors.Join(fmt.Errorf("the snapshots are there, and not of a frozen file system: %s: %w", strings.Join(texts(taken), ", "), err), perr)
	}
	return fmt.Errorf("no snapshot was taken: %w", err)
}

// takeBack is how long the owner may take to remove snapshots that are not of frozen file systems.
const takeBack = 10 * time.Second

// unknown returns the error of a command that got no answer to its request for snapshots. The owner refuses it as soon
// as it notices that nobody waits for the answer any more, but may have done it before.
func unknown(wanted []cow.Ref, err error) error {
	list := make([]string, len(wanted))
	for i, r := range wanted {
		if list[i] = r.String(); r.Snapshot == "" {
			list[i] += "@auto-TIME"
		}
	}
	return fmt.Errorf("it is not known whether %s was taken; if it is there, it may not be of a frozen file system: 'vdisk rm %s' removes it: %w",
		strings.Join(list, ", "), strings.Join(list, " "), err)
}

// mayTake returns the error of snapshots that are bound to fail, so that nothing is frozen for them.
func mayTake(c *cli.Context, s owner.Store, wanted []cow.Ref) error {
	all, err := s.Volumes(c.Context)
	if err != nil {
		return err
	}
	for _, r := range wanted {
		i := slices.IndexFunc(all, func(v owner.Volume) bool { return v.Name == r.Volume })
		switch {
		case i < 0:
			return fmt.Errorf("snapshot: volume %q: %w", r.Volume, cow.ErrNotFound)
		case slices.ContainsFunc(all[i].Snapshots, func(sn cow.SnapshotInfo) bool { return sn.Name == r.Snapshot }):
			return fmt.Errorf("snapshot: %s: %w", r, cow.ErrExists)
		}
	}
	return nil
}

// volumesOf returns the names of the volumes.
func volumesOf(refs []cow.Ref) (names []string) {
	for _, r := range refs {
		names = append(names, r.Volume)
	}
	return names
}

// mayFreeze returns an error if the store is on a file system, which would stop the store, too, or if nobody serves a
// device of the file system. It also does if it is known that the file system is on none of the volumes, or also on
// another one.
func (a *app) mayFreeze(c *cli.Context, s owner.Store, path string, volumes []string) error {
	same, err := freeze.SameFileSystem(path, a.dir)
	if err != nil {
		return err
	}
	if same {
		return fmt.Errorf("the store %s is on this file system: %w", a.dir, cow.ErrInvalid)
	}
	all, err := s.Volumes(c.Context)
	if err != nil {
		return err
	}
	below := a.devicesBelow(path)
	attached, on := 0, false
	for _, v := range all {
		for _, d := range v.Devices {
			named := slices.Contains(volumes, v.Name) && d.Ref.Snapshot == ""
			is := slices.Contains(below, filepath.Base(d.Path))
			if is {
				if err := attended(s, d); err != nil {
					return err
				}
			}
			if is && !named {
				return fmt.Errorf("it is on %s, which is %v, and the snapshots are of %s: %w", d.Path, d.Ref, strings.Join(volumes, ", "), cow.ErrInvalid)
			}
			on = on || is
			if named {
				attached++
			}
		}
	}
	if on {
		return nil
	}
	if len(below) > 0 && attached == len(volumes) {
		return fmt.Errorf("it is on /dev/%s, and %s; name a snapshot of the volume that is /dev/%[1]s: %[3]w", below[0], notBelow(all, volumes), cow.ErrInvalid)
	}
	a.note("it cannot be known whether the file system at %s is on %s, so it was not checked", path, strings.Join(volumes, ", "))
	return nil
}

// attended returns an error if nobody serves a device, or nobody but this process could. Freezing writes to the device
// and would wait for ever. Nothing interrupts that, and no daemon can begin to serve while this process has the store.
func attended(s owner.Store, d owner.Device) error {
	_, own := s.(*owner.Owner)
	if !d.Waits && !own {
		return nil
	}
	err := fmt.Errorf("it is on %s, which is %v, and waits for its server: %w", d.Path, d.Ref, cow.ErrBusy)
	return hintedError{err, "'vdisk recover' brings a server, then try again"}
}

// notBelow says where the volumes are attached.
func notBelow(all []owner.Volume, volumes []string) string {
	var list []string
	for _, v := range all {
		if path, _ := deviceOf(v, ""); path != "" && slices.Contains(volumes, v.Name) {
			list = append(list, v.Name+" is "+path)
		}
	}
	return strings.Join(list, ", ")
}
