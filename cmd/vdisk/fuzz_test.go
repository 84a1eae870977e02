package main

import (
	"encoding/json"
	"io"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/vdisk/vdisk/internal/size"
)

// FuzzSize compares the parser of sizes with exact arithmetic.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"0", "1", "10G", "1.5k", "1KiB", "1kb", "16EiB", "8P", "9223372036854775807", "9223372036854775808", "1e3", "0x10", "1_000", "-1", "+1", "1 G", "", "b", "ib", "1i", "1.", ".5", "1.5", "0.1b", "NaN", "Inf", "1TB", "1gib", "00017", "\x9ckb", "10\u212a"} {
		f.Add(s)
	}
	form := regexp.MustCompile(`\A([0-9]+)(\.[0-9]*)?(?i:([kmgtp])(ib)?|b|([kmgtp])i?)?\z`)
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err != nil {
			if n != 0 || !strings.Contains(err.Error(), "size") {
				t.Fatal(n, err)
			}
			if m := form.FindStringSubmatch(s); m != nil && m[2] == "" && len(m[1]) < 6 && m[4] != "" {
				t.Fatalf("%q is refused: %v", s, err)
			}
			return
		}
		m := form.FindStringSubmatch(s)
		if m == nil || n < 0 {
			t.Fatalf("%q is %d", s, n)
		}
		unit := strings.ToLower(m[3] + m[5])
		shift := uint(0)
		if unit != "" {
			shift = uint(10 * (1 + strings.Index(size.Prefixes, unit)))
		}
		want, ok := new(big.Rat).SetString(m[1] + strings.TrimSuffix(m[2], "."))
		if !ok {
			t.Fatal(m)
		}
		want.Mul(want, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), shift)))
		whole := new(big.Int).Quo(want.Num(), want.Denom())
		diff := new(big.Int).Sub(whole, big.NewInt(n))
		// A fraction is a float64, which has 53 bits.
		if slack := new(big.Int).Rsh(whole, 52); diff.CmpAbs(slack.Add(slack, big.NewInt(1))) > 0 || m[2] == "" && diff.Sign() != 0 {
			t.Fatalf("%q is %d, want %v", s, n, whole)
		}
	})
}

// FuzzArguments puts arguments into order. None may get lost or be made up, except that help becomes --help; what stands
// behind -- must stay behind it; and ordered arguments are in order.
func FuzzArguments(f *testing.F) {
	for _, s := range []string{"create v --size 10G", "ls -Ht all", "--json ls -l", "help create", "help", "rm -- -v", "create --size", "--store", "-x", "create v --size=1G -- --size", "snapshot a@b c@d", "- -", "create --help v", "bench --json -"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		if len(line) > 500 {
			return
		}
		args := append([]string{"vdisk"}, strings.Split(line, " ")...)
		program := (&app{stdout: plainWriter{io.Discard}, stderr: plainWriter{io.Discard}}).program()
		before := slices.Clone(args)
		got := reorderArgs(program, args)
		if !slices.Equal(args, before) || got[0] != "vdisk" {
			t.Fatalf("%q became %q", before, got)
		}
		if strings.HasPrefix(args[len(args)-1], "-") {
			return // its value may be missing, and package cli then reports that, whatever the other arguments are
		}
		asksForHelp := slices.ContainsFunc(got, func(a string) bool {
			return a == "--help" || strings.HasPrefix(a, "-") && strings.ContainsAny(a, "h")
		})
		count := func(list []string) map[string]int {
			n := map[string]int{}
			for _, a := range list {
				n[a]++
			}
			delete(n, "--")
			delete(n, "help")
			delete(n, "--help")
			return n
		}
		was, is := count(before), count(got)
		for a, n := range is {
			if was[a] < n {
				t.Fatalf("%q became %q: %q is made up", before, got, a)
			}
		}
		for a, n := range was {
			if is[a] < n && !asksForHelp {
				t.Fatalf("%q became %q: %q is lost", before, got, a)
			}
		}
	})
}

// FuzzPlain holds what is written for people to be printable, and JSON to mean the same as before.
func FuzzPlain(f *testing.F) {
	for _, s := range []string{hostile, "plain", "\u2028\n", "\\u0041", "\U0010ffff", "\xf0\x9f", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		text := cell(s)
		if !utf8.ValidString(text) || strings.ContainsAny(text, "\x00\n\t\x1b\x7f\u009b\u202e") || cell(text) != text {
			t.Fatalf("%q is written as %q", s, text)
		}
		var out strings.Builder
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := (plainWriter{&out}).Write(b); n != len(b) || err != nil {
			t.Fatal(n, err)
		}
		var back, want string
		if err := json.Unmarshal([]byte(out.String()), &back); err != nil || json.Unmarshal(b, &want) != nil || back != want {
			t.Fatalf("%s is written as %s, which is %q (%v)", b, out.String(), back, err)
		}
	})
}

// FuzzCompression reads the flag --compress.
func FuzzCompression(f *testing.F) {
	for _, s := range []string{"none", "s2", "zstd", "zstd:1", "zstd:19", "zstd:20", "zstd:0", "zstd:-1", "zstd:+3", "zstd:", "s2:1", ":", "zstd:03"} {
		f.Add(s)
	}
	form := regexp.MustCompile(`\A(none|s2|zstd|zstd:[+]?0*([1-9]|1[0-9]))\z`)
	f.Fuzz(func(t *testing.T, s string) {
		codec, level, err := parseCompression(s)
		if (err == nil) != form.MatchString(s) {
			t.Fatalf("%q: %v %d, %v", s, codec, level, err)
		}
	})
}
