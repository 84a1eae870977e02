package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBar: a bar shows nothing at first, since the rate of the first moment is none, and then bytes of how many.
func TestBar(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1, 0)
	b := newBar(&out, func() time.Time { return now }, "importing v", 100<<20, ofBytes...)
	b.set(1 << 20)
	now = now.Add(settle - 1)
	b.set(2 << 20)
	b.finish()
	if out.Len() > 0 {
		t.Errorf("at first it shows %q", out.String())
	}
	now = now.Add(1)
	b.set(30 << 20)
	if s := out.String(); !strings.Contains(s, "importing v  30%") || !strings.Contains(s, "30/100 MiB") || !strings.Contains(s, "/s") {
		t.Errorf("it shows %q", s)
	}
	shown := out.Len()
	b.finish()
	if out.Len() == shown {
		t.Error("it stays")
	}
	new(bar).set(1)
	new(bar).of(1, 2)
	new(bar).finish()
}

// TestClaimTerminal: one process at a time draws on a terminal, also if the others have inherited the same open file.
func TestClaimTerminal(t *testing.T) {
	tty, err := os.Create(filepath.Join(t.TempDir(), "tty"))
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	first, ok := claimTerminal(tty)
	if !ok || first == nil {
		t.Fatal("the first one may not draw")
	}
	if _, ok := claimTerminal(tty); ok {
		t.Error("two draw at once")
	}
	(&bar{claim: first}).finish()
	second, ok := claimTerminal(tty)
	if !ok || second == nil {
		t.Fatal("the next one may not draw")
	}
	second.Close()
	if _, ok := claimTerminal(&bytes.Buffer{}); !ok {
		t.Error("nothing is drawn where no claim is possible")
	}
}
