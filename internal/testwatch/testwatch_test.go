package testwatch

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

// hangs is set in a process that runs the tests which hang.
var hangs = os.Getenv("TESTWATCH_HANGS") != ""

func TestMain(m *testing.M) { os.Exit(Run(m)) }

func hangHere() { select {} }

// TestHangs is run by TestRun, and hangs in a subtest and in a goroutine.
func TestHangs(t *testing.T) {
	if !hangs {
		return
	}
	go hangHere()
	t.Run("sub", func(*testing.T) { hangHere() })
}

// TestParallelWaits waits for its turn until the tests that sleep have ended, which is longer than one test may take.
func TestParallelWaits(t *testing.T) { t.Parallel() }

func TestSleeps(*testing.T) { sleep() }

func TestSleepsToo(*testing.T) { sleep() }

func sleep() {
	if os.Getenv("TESTWATCH_SLEEPS") != "" {
		time.Sleep(900 * time.Millisecond)
	}
}

// again runs tests of this package in another process, with a limit of 1.5 s for each, and returns what it printed.
func again(t *testing.T, variable, run string) (string, error) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", run, "-test.timeout", "3s", "-test.v")
	cmd.Env = append(os.Environ(), variable+"=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestRun: a test that hangs is ended, by its name, with the stacks.
func TestRun(t *testing.T) {
	t.Parallel()
	out, err := again(t, "TESTWATCH_HANGS", "^TestHangs$")
	if err == nil || !strings.Contains(out, "test timed out after 1.5s: TestHangs") || strings.Count(out, "testwatch.hangHere(") < 2 {
		t.Errorf("a test that hangs: %v\n%s", err, out)
	}
}

// TestRunCountsTurns: the time for which a test waits for its turn does not count.
func TestRunCountsTurns(t *testing.T) {
	t.Parallel()
	if out, err := again(t, "TESTWATCH_SLEEPS", "^Test(ParallelWaits|Sleeps|SleepsToo)$"); err != nil {
		t.Errorf("tests that wait for one another: %v\n%s", err, out)
	}
}

// record is a test that keeps how it failed.
type record struct{ failure string }

func (r *record) Helper() {}
func (r *record) Fatalf(format string, args ...any) {
	r.failure = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func TestWait(t *testing.T) {
	c := make(chan int, 1)
	c <- 7
	if got := Wait(t, Long, "a value", c); got != 7 {
		t.Errorf("got %d", got)
	}
	Do(t, Long, "nothing", func() {})
	var r record
	end := make(chan struct{})
	go func() {
		defer close(end)
		Do(&r, time.Millisecond, "the lock", hangHere)
	}()
	<-end
	if !strings.Contains(r.failure, "the lock: hangs") || !strings.Contains(r.failure, "testwatch.hangHere(") {
		t.Errorf("the failure is %q", r.failure)
	}
}
