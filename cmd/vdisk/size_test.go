package main

import (
	"math"
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "1k": 1 << 10, "1K": 1 << 10, "10M": 10 << 20, "10MiB": 10 << 20, "3g": 3 << 30,
		"64T": 64 << 40, "2P": 2 << 50, "1.5G": 3 << 29, "0.5K": 512, "1.7": 1, "7b": 7, "9223372036854775807": math.MaxInt64,
		"8191P": 8191 << 50, "9007199254740991K": math.MaxInt64 &^ 1023, "8191.5P": 8191<<50 + 1<<49,
	} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"9223372036854775808", "18446744073709551616", "99999999999999999999999", "8192P", "9000P", "9007199254740992K",
		"8388608T", "8192.5P", "9223372036854775807.5",
	} {
		if got, err := parseSize(text); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "-1", "+1", "K", "1GB", "10kb", "1 G", "1e3", "0x10", "1_000", "1E", "b", "i", "1i", "1ib", "1.2.3", "1KK", "Inf", "NaN", "--size", "1.", "Ki"} {
		if got, err := parseSize(text); err == nil && text != "1." {
			t.Errorf("%q is taken for %d", text, got)
		}
	}
}
