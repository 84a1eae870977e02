// Package retention decides which snapshots of a volume stay, by the rules of 'restic forget': docs/retention.md. It
// knows nothing of stores.
package retention

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Property is the name of the property of a volume that has its policy as text.
const Property = "auto.keep"

// All stands for a number without a limit.
const All = -1

// Policy is a set of rules. A snapshot stays if any of them keeps it. A rule with the number 0 keeps nothing.
type Policy struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly int
	Within                                       Duration
}

// rules are the names of the rules that have a number, in the order in which they are shown.
var rules = []string{"last", "hourly", "daily", "weekly", "monthly", "yearly"}

// number returns the number of the rule with a name, or nil if there is no such rule.
func (p *Policy) number(rule string) *int {
	return map[string]*int{
		"last": &p.Last, "hourly": &p.Hourly, "daily": &p.Daily, "weekly": &p.Weekly, "monthly": &p.Monthly, "yearly": &p.Yearly,
	}[rule]
}

// Set gives a rule its number or duration.
func (p *Policy) Set(rule, value string) (err error) {
	if rule == "within" {
		p.Within, err = ParseDuration(value)
		return err
	}
	n := p.number(rule)
	switch {
	case n == nil:
		return fmt.Errorf("%q is no rule: there are %s and within", rule, strings.Join(rules, ", "))
	case value == "unlimited":
		*n = All
		return nil
	}
	if *n, err = strconv.Atoi(value); err != nil || *n < 0 {
		*n = 0
		return fmt.Errorf("%s: %q is no number of snapshots, nor 'unlimited'", rule, value)
	}
	return nil
}

// IsEmpty reports whether the policy keeps nothing.
func (p Policy) IsEmpty() bool { return p == Policy{} }

// ErrEmpty is the error of a policy that keeps nothing.
var ErrEmpty = errors.New("no rule keeps any snapshot")

// Parse parses a policy as String writes it: RULE=VALUE, separated by commas. It has to keep something.
func Parse(text string) (p Policy, err error) {
	seen := map[string]bool{}
	for part := range strings.SplitSeq(text, ",") {
		rule, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		switch {
		case !ok:
			return p, fmt.Errorf("%q is not RULE=NUMBER, such as daily=7", part)
		case seen[rule]:
			return p, fmt.Errorf("%s is there twice", rule)
		}
		seen[rule] = true
		if err := p.Set(rule, value); err != nil {
			return p, err
		}
	}
	if p.IsEmpty() {
		return p, ErrEmpty
	}
	return p, nil
}

// String returns the rules that keep something.
func (p Policy) String() string {
	var parts []string
	for _, rule := range rules {
		switch n := *p.number(rule); n {
		case 0:
		case All:
			parts = append(parts, rule+"=unlimited")
		default:
			parts = append(parts, fmt.Sprintf("%s=%d", rule, n))
		}
	}
	if p.Within != (Duration{}) {
		parts = append(parts, "within="+p.Within.String())
	}
	return strings.Join(parts, ",")
}

// Duration is a time in parts of the calendar.
type Duration struct{ Years, Months, Days, Hours int }

// mostOfDuration bounds each part of a Duration, so that no time overflows.
const mostOfDuration = 9999

// ParseDuration parses a duration such as 1y6m, 7d or 2d12h: years, months, days and hours, in this order, each at most
// once. It is not zero.
func ParseDuration(text string) (d Duration, err error) {
	rest := text
	for _, part := range []struct {
		unit string
		n    *int
	}{{"y", &d.Years}, {"m", &d.Months}, {"d", &d.Days}, {"h", &d.Hours}} {
		digits := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
		after, ok := strings.CutPrefix(rest[len(digits):], part.unit)
		if !ok || digits == "" {
			continue
		}
		if *part.n, err = strconv.Atoi(digits); err != nil || *part.n > mostOfDuration {
			return Duration{}, fmt.Errorf("duration %q: at most %d of each", text, mostOfDuration)
		}
		rest = after
	}
	if rest != "" || d == (Duration{}) {
		return Duration{}, fmt.Errorf("duration %q is not one of years, months, days and hours, such as 1y6m, 7d or 2d12h", text)
	}
	return d, nil
}

// String returns the duration as ParseDuration parses it.
func (d Duration) String() string {
	var s strings.Builder
	for _, part := range []struct {
		n    int
		unit string
	}{{d.Years, "y"}, {d.Months, "m"}, {d.Days, "d"}, {d.Hours, "h"}} {
		if part.n != 0 {
			fmt.Fprintf(&s, "%d%s", part.n, part.unit)
		}
	}
	return s.String()
}

// before returns the time that is d before t.
func (d Duration) before(t time.Time) time.Time {
	return t.AddDate(-d.Years, -d.Months, -d.Days).Add(-time.Duration(d.Hours) * time.Hour)
}
