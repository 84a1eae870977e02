package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) scrubCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "scrub",
		Category:  groupMaintenance,
		Usage:     "read and verify all data in the background",
		UsageText: "vdisk scrub [--wait] [--rate SIZE] | --status | --pause | --stop",
		Description: "Begins a scrub, or goes on with one that was paused or cut off. It reads all live data from the disk, around the page cache.\n" +
			"The process that owns the store does it; if there is none, the command does, until the end. What is damaged is logged and\n" +
			"counted; 'vdisk check --read-data' lists it. A daemon begins a scrub by itself once in --scrub-every (default 30 days).\n" +
			"Without --rate it reads at most 32 MiB a second, and 1 MiB while others use the store.\n" +
			"Exit codes of a scrub that was waited for: 0 all is well, 6 something is damaged, 1 something could not be read.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "wait", Aliases: []string{"w"}, Usage: "wait for the end"},
			&cli.StringFlag{Name: "rate", Usage: "read at most `SIZE` a second, whatever others do; 0: no limit"},
			&cli.BoolFlag{Name: "status", Usage: "only show the last result, and the scrub that is under way"},
			&cli.BoolFlag{Name: "pause", Usage: "let the scrub rest until it is started again"},
			&cli.BoolFlag{Name: "stop", Usage: "give the scrub up"},
		},
	}, a.scrub)
}

// scrubJSON is what is known of scrubs, in the JSON output.
type scrubJSON struct {
	State string        `json:"state"` // none, running, paused, or interrupted: it goes on with the next daemon
	Now   *cow.ScrubRun `json:"now"`   // null: none
	Last  *cow.ScrubRun `json:"last"`  // null: none has come to its end
	Next  *time.Time    `json:"next"`  // when the owner begins one by itself; null: never
}

func scrubOf(s cow.ScrubStatus) scrubJSON {
	j := scrubJSON{State: "interrupted", Now: s.Now, Last: s.Last}
	switch {
	case s.Now == nil:
		j.State = "none"
	case s.Active:
		j.State = "running"
	case s.Paused:
		j.State = "paused"
	}
	if !s.Next.IsZero() {
		j.Next = &s.Next
	}
	return j
}

// scrubFields returns the lines about scrubs in the description of a store.
func scrubFields(a *app, j scrubJSON) (f [][2]string) {
	if r := j.Now; r != nil {
		f = append(f, [2]string{"scrub", fmt.Sprintf("%s, begun %s: %s, %s verified, %s", j.State, when(r.Started), percent(r), a.size(r.Bytes), found(r))})
	}
	if r := j.Last; r != nil {
		f = append(f, [2]string{"last scrub", fmt.Sprintf("%s, in %v: %s verified, %s", when(r.Started), r.Ended.Sub(r.Started), a.size(r.Bytes), found(r))})
	} else {
		f = append(f, [2]string{"last scrub", "none"})
	}
	if j.Next != nil {
		f = append(f, [2]string{"next scrub", when(*j.Next)})
	}
	return f
}

func percent(r *cow.ScrubRun) string {
	return fmt.Sprintf("%.0f %%", math.Floor(100*min(float64(r.Leaves)/float64(max(r.Total, 1)), 1)))
}

func found(r *cow.ScrubRun) string {
	text := fmt.Sprintf("%d damaged records", r.Damaged)
	if r.Unreadable > 0 {
		text += fmt.Sprintf(", %d that could not be read", r.Unreadable)
	}
	return text
}

func (a *app) scrub(c *cli.Context) error {
	what, set := owner.ScrubStart, 0
	for flag, w := range map[string]string{"status": owner.ScrubLook, "pause": owner.ScrubPause, "stop": owner.ScrubStop} {
		if c.Bool(flag) {
			what, set = w, set+1
		}
	}
	if set > 1 || set == 1 && (c.Bool("wait") || c.IsSet("rate")) {
		return usageError{c, errors.New("--status, --pause and --stop exclude each other, --wait and --rate")}
	}
	var o cow.ScrubOptions
	if c.IsSet("rate") {
		n, err := a.sizeBetween("--rate", c.String("rate"), 0, math.MaxInt64)
		if err != nil {
			return err
		}
		if o.Rate = n; n == 0 {
			o.Rate = -1
		}
	}
	with := a.during
	if what == owner.ScrubLook {
		with = a.look
	}
	return with(c, func(s owner.Store) error {
		_, remote := s.(*owner.Client)
		st, err := s.Scrub(c.Context, what, o)
		if err == nil && what == owner.ScrubStart && (c.Bool("wait") || !remote) {
			return a.waitForScrub(c.Context, s, st, remote)
		}
		if err != nil {
			return err
		}
		return a.printScrub(st)
	})
}

// waitForScrub waits for the end of a scrub, and prints its result.
func (a *app) waitForScrub(ctx context.Context, s owner.Store, st cow.ScrubStatus, remote bool) error {
	bar := a.bar("scrubbing", -1)
	defer bar.finish()
	var err error
	started := startOf(st)
	for st.Now != nil && st.Active && st.Now.Started.Equal(started) {
		bar.of(st.Now.Leaves, max(st.Now.Total, st.Now.Leaves))
		select {
		case <-ctx.Done():
			if remote {
				a.note("the owner of the store goes on with the scrub")
			} else {
				a.note("'vdisk scrub' goes on with the scrub")
			}
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
		if st, err = s.Scrub(ctx, owner.ScrubLook, cow.ScrubOptions{}); err != nil {
			return err
		}
	}
	bar.finish()
	if err := a.printScrub(st); err != nil {
		return err
	}
	r := st.Last
	switch {
	case r == nil, !started.IsZero() && !r.Started.Equal(started):
		return fmt.Errorf("the scrub was stopped: %w", cow.ErrBusy)
	case r.Damaged > 0:
		return fmt.Errorf("the scrub found %d damaged records: %w: 'vdisk check --read-data' lists them", r.Damaged, cow.ErrCorrupt)
	case r.Unreadable > 0:
		return fmt.Errorf("the scrub could not read %d records, and proves nothing of them", r.Unreadable)
	}
	return nil
}

func startOf(st cow.ScrubStatus) (t time.Time) {
	if st.Now != nil {
		t = st.Now.Started
	}
	return t
}

func (a *app) printScrub(st cow.ScrubStatus) error {
	j := scrubOf(st)
	return a.print(j, func() error { return a.fields(scrubFields(a, j)) })
}
