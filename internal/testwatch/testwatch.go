// Package testwatch ends tests that wait for ever, and says where they wait: with the stacks of all goroutines. It is
// for tests only.
//
// Run bounds every test of a package. Wait and Do bound one wait, and fail only the test that waits.
package testwatch

import (
	"bytes"
	"flag"
	"fmt"
	"reflect"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
	"unsafe"
)

// Long bounds one wait for something that takes well under a second on an idle machine. Only a hang takes longer: an
// emulated guest beside other work is slow.
const Long = 90 * time.Second

// Run runs the tests as m.Run does, and returns its code. If a test, with its subtests, takes more than half of the
// time that go test -timeout gives to all tests (5 minutes by default), Run ends the process as that time-out would,
// with the test's name and all stacks. A failure of one test so looks the same whichever limit ends it.
func Run(m *testing.M) int {
	tests := testsOf(m)
	for i := range tests {
		run, name := tests[i].F, tests[i].Name
		tests[i].F = func(t *testing.T) {
			if limit := limit(); limit > 0 {
				w := watch(name, limit)
				t.Cleanup(func() { w.Stop() }) // the first one registered is the last one called
			}
			run(t)
		}
	}
	return m.Run()
}

// limit is what one test may take, or 0 if the run has no limit.
func limit() time.Duration {
	f := flag.Lookup("test.timeout")
	if f == nil {
		return 0
	}
	return f.Value.(flag.Getter).Get().(time.Duration) / 2
}

// testsOf returns the tests that m will run. Package testing has no way to be told when a test begins, so this looks
// at a field of its own.
func testsOf(m *testing.M) []testing.InternalTest {
	f := reflect.ValueOf(m).Elem().FieldByName("tests")
	if !f.IsValid() || f.Type() != reflect.TypeFor[[]testing.InternalTest]() {
		panic("testwatch: this version of package testing keeps its tests elsewhere")
	}
	return *(*[]testing.InternalTest)(unsafe.Pointer(f.UnsafeAddr()))
}

// watch ends the process after limit, unless it is stopped. A test that waits for its turn to be parallel is not
// counted as running.
func watch(name string, limit time.Duration) *time.Timer {
	var timer *time.Timer
	set := make(chan struct{})
	timer = time.AfterFunc(limit, func() {
		<-set
		if waitsForTurn(name) {
			timer.Reset(limit)
			return
		}
		debug.SetTraceback("all")
		panic(fmt.Sprintf("test timed out after %v: %s", limit, name))
	})
	close(set)
	return timer
}

// waitsForTurn reports whether the test is in its call of T.Parallel.
func waitsForTurn(name string) bool {
	for _, g := range bytes.Split([]byte(Stacks()), []byte("\n\n")) {
		if bytes.Contains(g, []byte("testing.(*T).Parallel(")) && bytes.Contains(g, []byte("."+name+"(")) {
			return true
		}
	}
	return false
}

// Stacks returns the stacks of all goroutines.
func Stacks() string {
	for n := 1 << 20; ; n *= 2 {
		b := make([]byte, n)
		if k := runtime.Stack(b, true); k < n {
			return string(b[:k])
		}
	}
}

// TB is what a test needs to have here: testing.TB and rapid.T have it.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
}

// Wait returns the next value of c, or the zero value if c is closed. If neither happens in time it fails the test,
// with what it waited for and the stacks of all goroutines.
func Wait[T any](t TB, limit time.Duration, what string, c <-chan T) (v T) {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case v = <-c:
	case <-timer.C:
		t.Fatalf("%s: hangs: %v have passed\n%s", what, limit, Stacks())
	}
	return v
}

// Do calls fn in a goroutine of its own and waits for its end, as Wait does.
func Do(t TB, limit time.Duration, what string, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); fn() }()
	Wait(t, limit, what, done)
}
