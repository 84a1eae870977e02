package main

import (
	"testing"
	"time"
)

// TestParseSince: times are local unless they say otherwise, and days are those of the calendar.
func TestParseSince(t *testing.T) {
	zone := time.FixedZone("", 2*60*60)
	now := time.Date(2026, 3, 1, 14, 30, 15, 5, zone)
	for text, want := range map[string]time.Time{
		"2026-02-28":                time.Date(2026, 2, 28, 0, 0, 0, 0, zone),
		"2026-02-28 13:05":          time.Date(2026, 2, 28, 13, 5, 0, 0, zone),
		"2026-02-28 13:05:07":       time.Date(2026, 2, 28, 13, 5, 7, 0, zone),
		"2026-02-28T13:05:07":       time.Date(2026, 2, 28, 13, 5, 7, 0, zone),
		"2026-02-28T13:05:07Z":      time.Date(2026, 2, 28, 13, 5, 7, 0, time.UTC),
		"2026-02-28T13:05:07-01:00": time.Date(2026, 2, 28, 14, 5, 7, 0, time.UTC),
		"today":                     time.Date(2026, 3, 1, 0, 0, 0, 0, zone),
		"yesterday":                 time.Date(2026, 2, 28, 0, 0, 0, 0, zone),
		"1d":                        time.Date(2026, 2, 28, 14, 30, 15, 5, zone),
		"90m":                       time.Date(2026, 3, 1, 13, 0, 15, 5, zone),
		"0s":                        now,
	} {
		if got, err := parseSince(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "d", "-1d", "1.5d", "-2h", "2", "tomorrow", "2026-02-30", "2026-02-28 25:00"} {
		if got, err := parseSince(text, now); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}
