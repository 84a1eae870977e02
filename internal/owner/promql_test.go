package owner

import (
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/internal/metrics"
)

// A small part of PromQL, as much as the dashboard uses, evaluated over two scrapes a minute apart:
//
//	a op b              op: + - / > and "and on (LABELS)"; a side may be a number
//	NAME{L="V",L=~"V"}  the series of the second scrape
//	rate(SELECTOR[1m])  of the series that both scrapes have
//	sum by (LABELS) (EXPRESSION)
//	histogram_quantile(NUMBER, EXPRESSION)
//
// Prometheus 2.42 has answered all queries of the dashboard, too, by hand; and promtool check metrics has found nothing.

// vector is the value of an expression: numbers by labels. A number alone has nil labels.
type vector []series

type series struct {
	labels map[string]string
	v      float64
}

type promql struct {
	tokens      []string
	first, last map[string][]series // the scrapes, by name
}

// scraped returns a scrape as series by name, with the label that Prometheus adds.
func scraped(families []metrics.Family) map[string][]series {
	all := map[string][]series{}
	for _, f := range families {
		for _, s := range f.Samples {
			labels := maps.Clone(s.Labels)
			labels["instance"] = "127.0.0.1:9750"
			all[s.Name] = append(all[s.Name], series{labels, s.Value})
		}
	}
	return all
}

var promTokens = regexp.MustCompile(`"[^"]*"|=~|[a-zA-Z_][a-zA-Z0-9_]*|[0-9.]+m?|[-+/>(){}\[\],=]`)

// eval evaluates an expression. It panics with an error if it does not understand it.
func (p promql) eval(expr string) (v vector, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v, before %q", r, p.tokens)
		}
	}()
	p.tokens = promTokens.FindAllString(expr, -1)
	if len(strings.Join(p.tokens, "")) != len(strings.ReplaceAll(expr, " ", "")) {
		return nil, fmt.Errorf("it has characters that are no token")
	}
	v = p.binary(0)
	if len(p.tokens) > 0 {
		panic("the end was expected")
	}
	return v, nil
}

func (p *promql) next() string {
	t := p.tokens[0]
	p.tokens = p.tokens[1:]
	return t
}

func (p *promql) expect(t string) {
	if got := p.next(); got != t {
		panic(fmt.Sprintf("%q is not %q", got, t))
	}
}

func (p *promql) is(t string) bool { return len(p.tokens) > 0 && p.tokens[0] == t }

// levels are the operators, from those that bind least.
var levels = [][]string{{"and"}, {">"}, {"+", "-"}, {"/"}}

func (p *promql) binary(level int) vector {
	if level == len(levels) {
		return p.operand()
	}
	left := p.binary(level + 1)
	for len(p.tokens) > 0 && slices.Contains(levels[level], p.tokens[0]) {
		op := p.next()
		var on []string
		if op == "and" {
			p.expect("on")
			on = p.names()
		}
		left = combine(left, op, on, p.binary(level+1))
	}
	return left
}

// combine applies an operator to the pairs of series with equal labels, or with a number on one side to all.
func combine(a vector, op string, on []string, b vector) (out vector) {
	key := func(s series) string {
		if on == nil {
			return fmt.Sprint(s.labels)
		}
		return fmt.Sprint(project(s.labels, on))
	}
	number := func(v vector) bool { return len(v) == 1 && v[0].labels == nil }
	for _, x := range a {
		for _, y := range b {
			if !number(a) && !number(b) && key(x) != key(y) {
				continue
			}
			labels, v := x.labels, x.v
			if labels == nil {
				labels = y.labels
			}
			switch op {
			case "+":
				v += y.v
			case "-":
				v -= y.v
			case "/":
				v /= y.v
			case ">":
				if x.v <= y.v {
					continue
				}
			}
			out = append(out, series{labels, v})
		}
	}
	return out
}

func project(labels map[string]string, names []string) map[string]string {
	out := map[string]string{}
	for _, n := range names {
		if v, ok := labels[n]; ok {
			out[n] = v
		}
	}
	return out
}

func (p *promql) operand() vector {
	switch t := p.next(); {
	case t == "(":
		v := p.binary(0)
		p.expect(")")
		return v
	case t == "sum":
		p.expect("by")
		by := p.names()
		p.expect("(")
		v := p.binary(0)
		p.expect(")")
		return sumBy(v, by)
	case t == "rate":
		p.expect("(")
		v := p.selector(p.next(), true)
		p.expect(")")
		return v
	case t == "histogram_quantile":
		p.expect("(")
		q := p.operand()[0].v
		p.expect(",")
		v := p.binary(0)
		p.expect(")")
		return quantiles(q, v)
	case strings.ContainsAny(t[:1], "0123456789."):
		f, err := strconv.ParseFloat(t, 64)
		if err != nil {
			panic(err)
		}
		return vector{{nil, f}}
	default:
		return p.selector(t, false)
	}
}

// names parses a list of labels.
func (p *promql) names() (list []string) {
	p.expect("(")
	for {
		list = append(list, p.next())
		if !p.is(",") {
			break
		}
		p.next()
	}
	p.expect(")")
	return list
}

// selector parses the rest of a selector. Other than in Prometheus, its braces are needed, and a label that it names must
// be one of the series.
func (p *promql) selector(name string, rate bool) (out vector) {
	matches := map[string]*regexp.Regexp{}
	p.expect("{")
	for !p.is("}") {
		label, op := p.next(), p.next()
		value := strings.Trim(p.next(), `"`)
		if op == "=" {
			value = regexp.QuoteMeta(value)
		}
		matches[label] = regexp.MustCompile("^(?:" + value + ")$")
		if p.is(",") {
			p.next()
		}
	}
	p.expect("}")
	if rate {
		p.expect("[")
		p.next()
		p.expect("]")
	}
	before := map[string]float64{}
	for _, s := range p.first[name] {
		before[fmt.Sprint(s.labels)] = s.v
	}
	for _, s := range p.last[name] {
		wanted := true
		for label, m := range matches {
			v, there := s.labels[label]
			wanted = wanted && there && m.MatchString(v)
		}
		was, there := before[fmt.Sprint(s.labels)]
		if wanted && rate {
			s.v, wanted = (s.v-was)/60, there
		}
		if wanted {
			out = append(out, s)
		}
	}
	return out
}

func sumBy(v vector, by []string) (out vector) {
	sums := map[string]*series{}
	for _, s := range v {
		labels := project(s.labels, by)
		if len(labels) != len(by) {
			panic(fmt.Sprintf("sum by %v of series that have only %v", by, s.labels))
		}
		key := fmt.Sprint(labels)
		if sums[key] == nil {
			sums[key] = &series{labels: labels}
		}
		sums[key].v += s.v
	}
	for _, s := range sums {
		out = append(out, *s)
	}
	return out
}

// quantiles finds the bucket of a quantile; what Prometheus adds to it by interpolation is left out.
func quantiles(q float64, v vector) (out vector) {
	groups := map[string]vector{}
	for _, s := range v {
		rest := maps.Clone(s.labels)
		delete(rest, "le")
		groups[fmt.Sprint(rest)] = append(groups[fmt.Sprint(rest)], s)
	}
	limit := func(s series) float64 {
		f, err := strconv.ParseFloat(s.labels["le"], 64)
		if err != nil {
			panic(err)
		}
		return f
	}
	for _, g := range groups {
		slices.SortFunc(g, func(a, b series) int { return int(math.Copysign(1, limit(a)-limit(b))) })
		total := g[len(g)-1].v
		for _, s := range g {
			if total > 0 && s.v >= q*total {
				out = append(out, series{s.labels, limit(s)})
				break
			}
		}
	}
	return out
}

// TestPromQL holds the evaluation to what Prometheus answers.
func TestPromQL(t *testing.T) {
	l := func(pairs ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	p := promql{
		first: map[string][]series{"n_total": {{l("a", "1", "b", "x"), 60}, {l("a", "2", "b", "x"), 0}}},
		last: map[string][]series{
			"n_total": {{l("a", "1", "b", "x"), 120}, {l("a", "2", "b", "x"), 120}, {l("a", "3", "b", "x"), 7}},
			"g":       {{l("a", "1", "b", "x"), 40}},
			"h":       {{l("le", "1"), 1}, {l("le", "2"), 9}, {l("le", "+Inf"), 10}},
		},
	}
	for expr, want := range map[string]string{
		`n_total{a="1"}`:                               "[{map[a:1 b:x] 120}]",
		`n_total{a=~"1|9"}`:                            "[{map[a:1 b:x] 120}]",
		`n_total{c=~".*"}`:                             "[]",
		`rate(n_total{a=~".*"}[1m]) > 1`:               "[{map[a:2 b:x] 2}]",
		`sum by (b) (rate(n_total{a=~".*"}[1m]))`:      "[{map[b:x] 3}]",
		`n_total{a="1"} / (n_total{a="1"} + g{a="1"})`: "[{map[a:1 b:x] 0.75}]",
		`1 - g{a="1"}`:                                 "[{map[a:1 b:x] -39}]",
		`n_total{a="2"} and on (b) g{a="1"}`:           "[{map[a:2 b:x] 120}]",
		`n_total{a="2"} - g{a="1"}`:                    "[]",
		`histogram_quantile(0.5, h{le=~".*"})`:         "[{map[le:2] 2}]",
	} {
		v, err := p.eval(expr)
		if got := fmt.Sprint(v); got != want || err != nil {
			t.Errorf("%s: %s, %v", expr, got, err)
		}
	}
	for _, expr := range []string{`n_total`, `sum by (c) (n_total{a="1"})`, `n_total{a="1"} %`, `(g{a="1"}`} {
		if v, err := p.eval(expr); err == nil {
			t.Errorf("%s: %v", expr, v)
		}
	}
}
