package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/mattn/go-runewidth"
	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner"
)

// sinceHelp describes the values of --since in the help of commands that have it.
const sinceHelp = "--since takes a time, such as 2026-11-30 or '2026-11-30 14:00', today, yesterday, or how long ago: 90m, 2h, 7d."

func sinceFlag() cli.Flag {
	return &cli.StringFlag{Name: "since", Usage: "leave out what was before `TIME`"}
}

func (a *app) eventsCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "events",
		Category:  groupMaintenance,
		Usage:     "show what was done in the store, when and by whom",
		UsageText: "vdisk events [-f] [--since TIME] [--last N] [-H]",
		Description: "The journal of the store has what changed it, what came and went, and what happened to it. It keeps the last 1 to 2 MiB.\n" +
			"Columns: the time, the kind, the user and the process that asked for it, and what it was done to. With -f only the last\n" +
			"ten at first, unless --since or --last say otherwise. With --json one list, and with -f one event a line.\n" + sinceHelp,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with what happens, until interrupted"},
			sinceFlag(),
			&cli.IntFlag{Name: "last", Usage: "show only the last `N`"},
			&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"},
		},
	}, a.events)
}

func (a *app) historyCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "history",
		Category:  groupVolumes,
		Usage:     "show what was done to a volume or snapshot",
		UsageText: "vdisk history [--since TIME] [-H] VOL[@SNAP]",
		Description: "This is the part of 'vdisk events' that is about the volume and its snapshots, also under the names that the volume had\n" +
			"before. It is there for volumes that were removed, too.\n" + sinceHelp,
		Flags: []cli.Flag{
			sinceFlag(),
			&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"},
		},
	}, a.history)
}

// lastWhenFollowed is how many events -f shows at first.
const lastWhenFollowed = 10

// followEvery is how often a journal that is followed is looked at.
const followEvery = 200 * time.Millisecond

func (a *app) events(c *cli.Context) error {
	since, err := sinceOf(c)
	if err != nil {
		return err
	}
	last := c.Int("last")
	if c.IsSet("last") && last < 1 {
		return usageError{c, fmt.Errorf("--last %d: at least 1 is needed", last)}
	}
	if c.Bool("follow") && !c.IsSet("since") && !c.IsSet("last") {
		last = lastWhenFollowed
	}
	tail, err := a.journal()
	if err != nil {
		return err
	}
	defer func() { _ = tail.Close() }() // nothing was written
	list, err := read(tail, since, last)
	if err != nil {
		return err
	}
	p := newEventPrinter(a, c.Bool("script"))
	if !c.Bool("follow") {
		a.noteSkipped(tail)
		return a.printEvents(p, list)
	}
	return a.follow(c.Context, tail, p, list)
}

// follow prints a list of events, and then those that come, until ctx ends.
func (a *app) follow(ctx context.Context, tail *journal.Tail, p *eventPrinter, list []journal.Entry) error {
	for {
		for _, e := range list {
			if err := p.print(e); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil // that is how it ends
		case <-time.After(followEvery):
		}
		var err error
		if list, err = read(tail, time.Time{}, 0); err != nil {
			return err
		}
	}
}

func (a *app) history(c *cli.Context) error {
	r, err := ref(c, 0)
	if err != nil {
		return err
	}
	since, err := sinceOf(c)
	if err != nil {
		return err
	}
	tail, err := a.journal()
	if err != nil {
		return err
	}
	defer func() { _ = tail.Close() }() // nothing was written
	all, err := read(tail, time.Time{}, 0)
	if err != nil {
		return err
	}
	list := historyOf(all, r)
	if len(list) == 0 { // the journal does not reach back for ever
		err := a.look(c, func(s owner.Store) error {
			_, err := selectVolumes(c, s, []pattern{{r.String(), r.Volume, r.Snapshot, r.Snapshot != ""}})
			return err
		})
		if err != nil {
			return err
		}
	}
	list = slices.DeleteFunc(list, func(e journal.Entry) bool { return e.Time.Before(since) })
	a.noteSkipped(tail)
	return a.printEvents(newEventPrinter(a, c.Bool("script")), list)
}

// journal opens the journal of the store.
func (a *app) journal() (*journal.Tail, error) {
	tail, err := owner.Journal(a.dir, a.foreign)
	if errors.Is(err, cow.ErrNotFound) {
		err = noStoreError{err}
	}
	return tail, err
}

// read returns all events that are there and not before since, or the last of these; last 0: all.
func read(tail *journal.Tail, since time.Time, last int) (list []journal.Entry, err error) {
	for {
		e, err := tail.Next()
		if err == io.EOF {
			return list, nil
		}
		if err != nil {
			return nil, err
		}
		if !e.Time.Before(since) {
			list = append(list, e)
		}
		if last > 0 {
			list = list[max(0, len(list)-last):]
		}
	}
}

func (a *app) noteSkipped(tail *journal.Tail) {
	if n := tail.Skipped(); n > 0 {
		a.note("%d lines of the journal are damaged, and are left out", n)
	}
	if n := tail.LeftOut(); n > 0 {
		a.note("the journal is far larger than vdisk makes it; its first %s are left out", a.size(n))
	}
}

// historyOf returns the events that are about a volume or snapshot, and about the names that it had before. It
// leaves out another one that had a name earlier.
func historyOf(all []journal.Entry, of cow.Ref) (some []journal.Entry) {
	for _, e := range slices.Backward(all) {
		if !isAbout(e, of) {
			continue
		}
		if len(some) > 0 && tookAway(e, of) {
			break
		}
		some = append(some, e)
		if e.Error == "" && slices.Contains(e.Names, of.String()) && slices.Contains([]string{"create", "clone", "snapshot"}, e.Kind) {
			break // that made it
		}
		if e.Kind != "rename" || e.Error != "" || len(e.Names) != 1 {
			continue
		}
		switch from, err := cow.ParseRef(e.From); {
		case err != nil:
		case e.Names[0] == of.String():
			of = from
		case e.Names[0] == of.Volume:
			of.Volume = from.Volume
		}
	}
	slices.Reverse(some)
	return some
}

// tookAway reports whether after an event nothing had the name: what has it later is another volume or snapshot.
func tookAway(e journal.Entry, of cow.Ref) bool {
	is := func(name string) bool { return name == of.String() || name == of.Volume }
	switch {
	case e.Error != "":
		return false
	case e.Kind == "rename":
		return is(e.From) && !slices.ContainsFunc(e.Names, is)
	}
	return (e.Kind == "rm" || e.Kind == "prune") && slices.ContainsFunc(e.Names, is)
}

// isAbout reports whether an event is about a volume or one of its snapshots, or about the snapshot that of names.
func isAbout(e journal.Entry, of cow.Ref) bool {
	volume := of.Snapshot == "" || slices.Contains([]string{"rename", "rollback", "rm"}, e.Kind)
	return slices.ContainsFunc(append(e.Names[:len(e.Names):len(e.Names)], e.From), func(name string) bool {
		if of.Snapshot == "" {
			name, _, _ = strings.Cut(name, "@")
		}
		return name == of.String() || volume && name == of.Volume
	})
}

// printEvents prints a list.
func (a *app) printEvents(p *eventPrinter, list []journal.Entry) error {
	return a.print(map[string]any{"events": append([]journal.Entry{}, list...)}, func() error {
		for _, e := range list {
			if err := p.print(e); err != nil {
				return err
			}
		}
		return nil
	})
}

// eventPrinter prints events one by one. The widths of its columns are fixed, since nobody knows what comes next.
type eventPrinter struct {
	a      *app
	script bool
	begun  bool
	users  journal.Users
}

func newEventPrinter(a *app, script bool) *eventPrinter {
	return &eventPrinter{a: a, script: script, users: journal.Users{}}
}

func (p *eventPrinter) print(e journal.Entry) error {
	switch {
	case p.a.json:
		return json.NewEncoder(p.a.stdout).Encode(e)
	case p.script:
		_, err := fmt.Fprintf(p.a.stdout, "%s\t%s\t%s\t%s\n", e.Time.UTC().Format(time.RFC3339Nano), cell(e.Kind), cell(p.users.By(e.By)), cell(p.what(e)))
		return err
	}
	line := func(time, kind, by, what string) string {
		return fmt.Sprintf("%-19s  %s  %s  %s\n", time, runewidth.FillRight(kind, 11), runewidth.FillRight(by, 12), what)
	}
	if !p.begun {
		p.begun = true
		if _, err := io.WriteString(p.a.stdout, line("TIME", "KIND", "BY", "WHAT")); err != nil {
			return err
		}
	}
	to, text := p.a.stdout, line(when(e.Time), cell(e.Kind), cell(p.users.By(e.By)), cell(p.what(e)))
	if e.Error != "" && p.a.colored() {
		to, text = rawOf(to), red+strings.TrimSuffix(text, "\n")+plain+"\n" // all parts are escaped
	}
	_, err := io.WriteString(to, text)
	return err
}

// shownNames is how many names of an event are shown.
const shownNames = 5

// what returns what an event is about, and what is known of it.
func (p *eventPrinter) what(e journal.Entry) string {
	if p.script {
		return e.Text(0, p.a.size)
	}
	return e.Text(shownNames, p.a.size)
}
