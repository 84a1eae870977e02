package retention

import (
	"cmp"
	"slices"
	"time"
)

// Future is the reason why a snapshot stays whose time has not come.
const Future = "its time is in the future"

// counted is a rule that keeps the newest snapshot of each period, until it has kept as many as it may.
type counted struct {
	name   string
	left   int // All: no limit
	period func(t time.Time, nr int) int
	last   int // the period of the snapshot that was kept last; -1: none was
}

func (p Policy) counted() []*counted {
	return []*counted{
		{"last", p.Last, func(_ time.Time, nr int) int { return nr }, -1},
		{"hourly", p.Hourly, func(t time.Time, _ int) int { return day(t)*100 + t.Hour() }, -1},
		{"daily", p.Daily, func(t time.Time, _ int) int { return day(t) }, -1},
		{"weekly", p.Weekly, func(t time.Time, _ int) int { year, week := t.ISOWeek(); return year*100 + week }, -1},
		{"monthly", p.Monthly, func(t time.Time, _ int) int { return day(t) / 100 }, -1},
		{"yearly", p.Yearly, func(t time.Time, _ int) int { return t.Year() }, -1},
	}
}

// day returns the day of t as a number of the form YYYYMMDD.
func day(t time.Time) int { return t.Year()*10000 + int(t.Month())*100 + t.Day() }

// keeps returns why the rule keeps the snapshot of time t, or "". It is asked for one snapshot after the other, the
// newest first; nr is its number, and oldest says that it is the last one.
func (c *counted) keeps(t time.Time, nr int, oldest bool) string {
	if c.left == 0 {
		return ""
	}
	period := c.period(t, nr)
	again := period == c.last
	if again && !oldest {
		return ""
	}
	c.last = period
	if c.left > 0 {
		c.left--
	}
	if again {
		return "oldest " + c.name + " snapshot"
	}
	return c.name + " snapshot"
}

// Apply decides which of a volume's snapshots stay. times are when they were taken. It returns the reasons why each
// stays. One that goes has none. Periods are of the calendar of zone. Snapshots with a time after now stay, and count
// for no rule. Of those with equal times, the last one is the newest.
func (p Policy) Apply(times []time.Time, now time.Time, zone *time.Location) (reasons [][]string) {
	reasons = make([][]string, len(times))
	var order []int
	for i, t := range times {
		if t.After(now) {
			reasons[i] = []string{Future}
			continue
		}
		order = append(order, i)
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Or(times[b].Compare(times[a]), b-a) })
	rules := p.counted()
	for nr, i := range order {
		t := times[i].In(zone)
		if p.Within != (Duration{}) && t.After(p.Within.before(times[order[0]].In(zone))) {
			reasons[i] = append(reasons[i], "within "+p.Within.String())
		}
		for _, c := range rules {
			if why := c.keeps(t, nr, nr == len(order)-1); why != "" {
				reasons[i] = append(reasons[i], why)
			}
		}
	}
	return reasons
}
