// Command mutants breaks the program on purpose, one line at a time, and reports which test notices.
//
//	mutants [flags] FILE...
//
// A FILE is a list of mutants, blocks that a blank line separates:
//
//	name: the table is committed without a sync
//	file: metadata/db.go
//	- 			NoSync:          o.NoSync,
//	+ 			NoSync:          true,
//	test: ./cmd/vdisk TestOrderOfSystemCalls
//
// The lines after - must occur exactly once in the file; those after + take their place. The test is a package and,
// optionally, a pattern of tests; the command fails if it passes with the mutant, or if only a time limit ends it. A line
// "env: VDISK_FAULTS=all" sets a variable for it, so that a test that otherwise takes a sample tries everything. A block
// that says "equivalent: WHY" is not run: no test can tell that mutant from the program.
//
// With -results, a run can be made in pieces: what was killed is noted in a file as soon as it is known, and is not tried
// again as long as the mutant, the file that it changes and the package of its test are the same.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	run, pkg string
	choose   int
	parallel int
	limit    time.Duration
	during   time.Duration
	base     bool
	results  string
}

func main() {
	var o options
	flag.StringVar(&o.run, "run", "", "run only mutants whose name matches this regular expression")
	flag.StringVar(&o.pkg, "package", "", "run only mutants whose test is in a package that matches this regular expression")
	flag.IntVar(&o.choose, "choose", 0, "run only so many of them, chosen at random")
	flag.IntVar(&o.parallel, "parallel", 1, "mutants to try at once")
	flag.DurationVar(&o.limit, "timeout", 10*time.Minute, "limit for the tests of one mutant")
	flag.DurationVar(&o.during, "for", 0, "begin with no mutant after this time")
	flag.BoolVar(&o.base, "base", false, "first run the tests without a mutant: they must pass")
	flag.StringVar(&o.results, "results", "", "note what is killed in this file, and leave out what it has")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ms, err := choose(o, flag.Args())
	if err == nil {
		err = o.runAll(ctx, ms)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// choose returns the mutants of the files that the options ask for.
func choose(o options, files []string) (chosen []mutant, err error) {
	names, err := regexp.Compile(o.run)
	if err != nil {
		return nil, err
	}
	packages, err := regexp.Compile(o.pkg)
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		ms, err := read(file)
		if err != nil {
			return nil, err
		}
		for _, m := range ms {
			if names.MatchString(m.name) && packages.MatchString(m.pkg) {
				chosen = append(chosen, m)
			}
		}
	}
	if len(chosen) == 0 {
		return nil, errors.New("no mutant matches")
	}
	if o.choose > 0 && o.choose < len(chosen) {
		rand.Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
		chosen = chosen[:o.choose]
	}
	return chosen, nil
}

// tally is what became of the mutants.
type tally struct {
	mu                         sync.Mutex // guards the counts and the output
	killed, before, equivalent int        // before: of those that were killed, by an earlier run
	untried                    int
	bad, late                  []string // what was not killed, and what a test noticed because it waited in vain
}

// runAll tries the mutants, so many at once, and prints what became of each.
func (o *options) runAll(ctx context.Context, ms []mutant) error {
	start := time.Now()
	results, err := openResults(o.results)
	if err != nil {
		return err
	}
	defer results.close()
	var t tally
	todo := ms[:0:0]
	for _, m := range ms {
		if by, ok := results.has(&m); ok {
			t.add(&m, by, nil, "in an earlier run")
			t.before++
		} else {
			todo = append(todo, m)
		}
	}
	if o.base {
		failed := testBase(ctx, todo)
		todo = slices.DeleteFunc(todo, func(m mutant) bool {
			err := failed[m.group()]
			if err != nil {
				t.add(&m, "", err, "")
			}
			return err != nil
		})
	}
	var wg sync.WaitGroup
	next := make(chan *mutant)
	for range max(o.parallel, 1) {
		wg.Go(func() {
			for m := range next {
				begun := time.Now()
				by, err := m.try(ctx, o.limit)
				if err == nil && m.equivalent == "" {
					err = results.add(m, by)
				}
				t.add(m, by, err, fmt.Sprintf("%.0f s", time.Since(begun).Seconds()))
			}
		})
	}
	for i := range todo {
		if ctx.Err() != nil || o.during > 0 && time.Since(start) > o.during {
			t.untried = len(todo) - i
			break
		}
		next <- &todo[i]
	}
	close(next)
	wg.Wait()
	return t.end(len(ms), time.Since(start))
}

// add counts and prints what became of a mutant.
func (t *tally) add(m *mutant, by string, err error, when string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case errors.Is(err, context.Canceled):
		t.untried++
	case err != nil:
		t.bad = append(t.bad, fmt.Sprintf("%s (%s): %v", m.name, m.file, err))
		fmt.Println("FAILED     ", t.bad[len(t.bad)-1])
	case m.equivalent != "":
		t.equivalent++
		fmt.Printf("equivalent  %s: %s\n", m.name, m.equivalent)
	default:
		t.killed++
		fmt.Printf("killed      %s: by %s, %s\n", m.name, by, when)
		if strings.HasSuffix(by, waited) {
			t.late = append(t.late, m.name)
		}
	}
}

// end prints the sum.
func (t *tally) end(all int, took time.Duration) error {
	fmt.Printf("\nmutants: %d killed (%d of them in an earlier run), %d equivalent, %d not killed, %d not tried, in %v\n",
		t.killed, t.before, t.equivalent, len(t.bad), t.untried, took.Round(time.Second))
	if len(t.late) > 0 {
		fmt.Println("noticed because something never came, which is good only if nothing else is wrong with it:", strings.Join(t.late, "; "))
	}
	for _, b := range t.bad {
		first, _, _ := strings.Cut(b, "\n")
		fmt.Println("not killed:", first)
	}
	switch {
	case len(t.bad) > 0:
		return fmt.Errorf("%d mutants live", len(t.bad))
	case t.untried > 0:
		return fmt.Errorf("%d mutants are left: run it again", t.untried)
	}
	fmt.Printf("proof: mutants: %d of %d killed, %d equivalent\n", t.killed, all, t.equivalent)
	return nil
}
