package retention

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// asDocumented is Apply by the words of restic's documentation, put another way: it looks at one rule after the other,
// and gathers the snapshots of each period.
func asDocumented(p Policy, times []time.Time, now time.Time, zone *time.Location) []map[string]bool {
	kept := make([]map[string]bool, len(times))
	var past []int // the newest first
	for i := len(times) - 1; i >= 0; i-- {
		if kept[i] = map[string]bool{}; times[i].After(now) {
			kept[i][Future] = true
		} else {
			past = append(past, i)
		}
	}
	if len(past) == 0 {
		return kept
	}
	slices.SortStableFunc(past, func(a, b int) int { return times[b].Compare(times[a]) })
	newest, oldest := past[0], past[len(past)-1]
	for rule, layout := range map[string]string{"last": "", "hourly": "2006-01-02 15h", "daily": "2006-01-02", "weekly": "", "monthly": "2006-01", "yearly": "2006"} {
		n := *p.number(rule)
		periods := map[string]int{} // the most recent snapshot of each period that has one or more
		var order []string
		for nr, i := range past {
			t := times[i].In(zone)
			name := t.Format(layout)
			switch rule {
			case "last":
				name = fmt.Sprint(nr)
			case "weekly":
				monday := t.AddDate(0, 0, -(int(t.Weekday())+6)%7)
				name = monday.Format("2006-01-02")
			}
			if _, seen := periods[name]; !seen {
				periods[name] = i
				order = append(order, name)
			}
		}
		for k, name := range order {
			if n == All || k < n {
				kept[periods[name]][rule+" snapshot"] = true
			}
		}
		if (n == All || len(order) < n) && !kept[oldest][rule+" snapshot"] { // not enough snapshots to keep one for each
			kept[oldest]["oldest "+rule+" snapshot"] = true
		}
	}
	if d := p.Within; d != (Duration{}) {
		l := times[newest].In(zone)
		start := time.Date(l.Year()-d.Years, l.Month()-time.Month(d.Months), l.Day()-d.Days, l.Hour(), l.Minute(), l.Second(), l.Nanosecond(), zone).Add(-time.Duration(d.Hours) * time.Hour)
		for _, i := range past {
			if times[i].After(start) {
				kept[i]["within "+d.String()] = true
			}
		}
	}
	return kept
}

// TestApply compares Apply with the documentation of restic: many series of snapshots, about the days on which clocks
// and years change, in several time zones.
func TestApply(t *testing.T) {
	var zones []*time.Location
	for _, name := range []string{"UTC", "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia"} {
		zone, err := time.LoadLocation(name)
		if err != nil {
			t.Skip(err) // no tzdata
		}
		zones = append(zones, zone)
	}
	days := []time.Time{
		time.Date(2026, 10, 25, 1, 0, 0, 0, time.UTC), time.Date(2026, 3, 29, 1, 0, 0, 0, time.UTC), time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2028, 2, 29, 12, 0, 0, 0, time.UTC), time.Date(2011, 12, 30, 10, 0, 0, 0, time.UTC), // a day that Apia left out
	}
	steps := []time.Duration{0, time.Minute, 20 * time.Minute, time.Hour, 5 * time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 31 * 24 * time.Hour, 200 * 24 * time.Hour}
	number := rapid.SampledFrom([]int{0, 0, 0, 1, 2, 3, 7, All})
	rapid.Check(t, func(t *rapid.T) {
		p := Policy{
			number.Draw(t, "last"), number.Draw(t, "hourly"), number.Draw(t, "daily"), number.Draw(t, "weekly"), number.Draw(t, "monthly"), number.Draw(t, "yearly"),
			rapid.SampledFrom([]Duration{{}, {}, {Hours: 1}, {Days: 7}, {Months: 1, Hours: 3}, {Years: 1}}).Draw(t, "within"),
		}
		zone := rapid.SampledFrom(zones).Draw(t, "zone")
		at := rapid.SampledFrom(days).Draw(t, "day").Add(-rapid.SampledFrom(steps).Draw(t, "before"))
		var times []time.Time
		for range rapid.IntRange(0, 30).Draw(t, "n") {
			at = at.Add(rapid.SampledFrom(steps).Draw(t, "step"))
			times = append(times, at)
		}
		now := at.Add(rapid.SampledFrom([]time.Duration{time.Hour, 0, -time.Hour, -48 * time.Hour, -10000 * time.Hour}).Draw(t, "now"))
		if rapid.Bool().Draw(t, "shuffled") { // the clock was set back
			times = rapid.Permutation(times).Draw(t, "order")
		}
		got := p.Apply(times, now, zone)
		for i, want := range asDocumented(p, times, now, zone) {
			list := []string{}
			for why := range want {
				list = append(list, why)
			}
			slices.Sort(list)
			is := slices.Sorted(slices.Values(got[i]))
			if !slices.Equal(is, list) {
				t.Fatalf("%v, %v in %v: snapshot %d of %v is kept for %q, not %q", p, now, zone, i, times, is, list)
			}
		}
	})
}

// TestSundays is the example of restic's documentation: a backup on each of twelve Sundays.
func TestSundays(t *testing.T) {
	var times []time.Time
	for i := range 12 {
		times = append(times, time.Date(2019, 9, 1+7*i, 11, 0, 0, 0, time.UTC))
	}
	keeps := func(text string, now time.Time) (days string) {
		p, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		for i, why := range p.Apply(times, now, time.UTC) {
			if len(why) > 0 {
				days += times[i].Format(" 0102 ") + strings.Join(why, "+")
			}
		}
		return days
	}
	now := times[11].Add(time.Hour)
	for text, want := range map[string]string{
		"daily=4":              " 1027 daily snapshot 1103 daily snapshot 1110 daily snapshot 1117 daily snapshot",
		"yearly=2":             " 0901 oldest yearly snapshot 1117 yearly snapshot",
		"monthly=2,last=1":     " 1027 monthly snapshot 1117 last snapshot+monthly snapshot",
		"within=14d":           " 1110 within 14d 1117 within 14d",
		"within=14d1h,last=1":  " 1103 within 14d1h 1110 within 14d1h 1117 within 14d1h+last snapshot",
		"monthly=unlimited":    " 0901 oldest monthly snapshot 0929 monthly snapshot 1027 monthly snapshot 1117 monthly snapshot",
		"hourly=1,yearly=1000": " 0901 oldest yearly snapshot 1117 hourly snapshot+yearly snapshot",
	} {
		if got := keeps(text, now); got != want {
			t.Errorf("%s keeps\n%s, not\n%s", text, got, want)
		}
	}
	// A week of two years is one week.
	times = []time.Time{time.Date(2026, 12, 31, 12, 0, 0, 0, time.UTC), time.Date(2027, 1, 1, 12, 0, 0, 0, time.UTC), time.Date(2027, 1, 4, 12, 0, 0, 0, time.UTC)}
	if got, want := keeps("weekly=3", now.AddDate(10, 0, 0)), " 1231 oldest weekly snapshot 0101 weekly snapshot 0104 weekly snapshot"; got != want {
		t.Errorf("%s, not %s", got, want)
	}
}

// TestFuture has a clock that is behind: snapshots that seem to be of the future stay, and are not counted.
func TestFuture(t *testing.T) {
	day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	times := []time.Time{day, day.AddDate(0, 0, 1), day.AddDate(0, 0, 2), day.AddDate(0, 0, 3)}
	got := Policy{Last: 1}.Apply(times, times[1], time.UTC)
	if want := "[[] [last snapshot] [" + Future + "] [" + Future + "]]"; fmt.Sprint(got) != want {
		t.Errorf("%v, not %s", got, want)
	}
}

// TestParse parses policies. A text that is no policy is refused.
func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"daily=7,hourly=24":  "hourly=24,daily=7",
		" last=3 , daily=0 ": "last=3",
		"yearly=unlimited":   "yearly=unlimited",
		"within=1y2m3d4h":    "within=1y2m3d4h",
		"within=36h,last=1":  "last=1,within=36h",
		"":                   "error", "daily": "error", "daily=": "error", "daily=-1": "error", "daily=x": "error", "dayly=1": "error", "last=0": "error",
		"last=1,last=2": "error", "within=": "error", "within=0d": "error", "within=7": "error", "within=1w": "error", "within=4h3d": "error",
		"within=1d1d": "error", "within=99999d": "error", "within=-1d": "error", "last=1,": "error", "last=99999999999999999999": "error",
	} {
		p, err := Parse(text)
		if got := cmp.Or(map[bool]string{true: "error"}[err != nil], p.String()); got != want {
			t.Errorf("%q: %q, %v, not %q", text, got, err, want)
		}
		if again, err := Parse(p.String()); err == nil && again != p {
			t.Errorf("%q: %+v, and from its text %+v", text, p, again)
		}
	}
}
