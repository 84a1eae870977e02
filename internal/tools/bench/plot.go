package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"slices"
	"strings"
)

// A chart is one SVG. gnuplot draws it.
type chart struct {
	name          string
	width, height int
	panels        []panel
	columns       int // of panels
}

// A panel has one plot: bars in groups, lines, or points in rows. Its data are series, a figure for each group of each.
type panel struct {
	title, x, y string
	kind        string // bars, lines, latency or ratios
	log         bool
	groups      []string
	at          []float64 // of lines, instead of names
	series      []series
}

type series struct {
	name    string
	style   string
	figures []figure
}

// styles of series. vdisk has the strongest colour; all are of Okabe and Ito's, which colour-blind readers can tell apart, and
// have different marks.
var styles = map[string]string{
	"vdisk":   "lc rgb '#C63A00' lw 3.5 pt 7 ps 0.9",
	"pale":    "lc rgb '#F0B08A' lw 2 pt 6 ps 0.9",
	"qcow2":   "lc rgb '#56B4E9' lw 2 pt 5 ps 0.9",
	"raw":     "lc rgb '#8C8C8C' lw 2 pt 9 ps 1.0",
	"nbdkit":  "lc rgb '#009E73' lw 2 pt 13 ps 1.1",
	"loop":    "lc rgb '#8C8C8C' lw 2 pt 9 ps 1.0",
	"dm-thin": "lc rgb '#0072B2' lw 2 pt 11 ps 1.0",
	"dm-vdo":  "lc rgb '#CC79A7' lw 2 pt 4 ps 1.0",
	"lvm":     "lc rgb '#E8D630' lw 2 pt 8 ps 1.0",
	"btrfs":   "lc rgb '#009E73' lw 2 pt 13 ps 1.1",
	"ublksrv": "lc rgb '#303030' lw 2 pt 12 ps 1.1",
}

func styleOf(name string) string {
	if s, is := styles[name]; is {
		return s
	}
	return "lc rgb '#8C8C8C' lw 2 pt 2"
}

const head = `set terminal svg size %d,%d enhanced font 'Helvetica,14' background '#ffffff' rounded
set encoding utf8
set micro
set output '%s'
set datafile missing '?'
set border 3 lc rgb '#404040'
set tics nomirror out scale 0.6
set grid y lc rgb '#d8d8d8' lw 1 dt solid
set title offset 0,-0.4
set style fill solid 1.0 border rgb '#ffffff'
set boxwidth 0.9
set multiplot layout %d,%d margins screen %s spacing screen %s
`

// script is the chart for gnuplot.
func (c chart) script(output string) string {
	var b strings.Builder
	columns := max(c.columns, 1)
	rows := (len(c.panels) + columns - 1) / columns
	w, h := float64(c.width), float64(c.height)
	left := 84.0
	if c.panels[0].kind == "ratios" {
		left = 290
	}
	perRow, n := 4, len(c.panels[0].series) // of the key, which is not wider than a panel
	if columns > 1 {
		perRow = 2
	} else if n > 4 {
		perRow = 3
	}
	top := 44 + 22*float64((n+perRow-1)/perRow)
	margins := fmt.Sprintf("%.4f,%.4f,%.4f,%.4f", left/w, 1-20/w, 72/h, 1-top/h)
	fmt.Fprintf(&b, head, c.width, c.height, output, rows, columns, margins, fmt.Sprintf("%.4f,%.4f", 96/w, 116/h))
	for i, p := range c.panels {
		if i == 0 { // one for all panels
			fmt.Fprintf(&b, "set key at screen 0.5, screen %.4f center top horizontal maxrows 1 samplen 1.6 width 2\n", 1-10/h)
		} else {
			b.WriteString("unset key\n")
		}
		p.write(&b, i)
	}
	b.WriteString("unset multiplot\n")
	return b.String()
}

// quote is a string for gnuplot, in which no character means anything.
func quote(s string) string {
	for _, c := range []string{"_", "^", "@", "{", "}", "&", "~"} {
		s = strings.ReplaceAll(s, c, `\\`+c)
	}
	return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"`
}

func bold(s string) string {
	if s == "" {
		return `""`
	}
	q := quote(s)
	return `"{/:Bold ` + q[1:len(q)-1] + `}"`
}

// most is the greatest figure of a panel.
func (p panel) most() float64 {
	m := 0.0
	for _, s := range p.series {
		for _, f := range s.figures {
			if f.known() {
				m = max(m, f.most)
			}
		}
	}
	return m
}

func (p panel) write(b *strings.Builder, n int) {
	fmt.Fprintf(b, "$d%d << EOD\n", n)
	groups := len(p.groups)
	if p.at != nil {
		groups = len(p.at)
	}
	for g := range groups {
		if p.at != nil {
			fmt.Fprint(b, p.at[g])
		} else {
			b.WriteString(quote(p.groups[g]))
		}
		for _, s := range p.series {
			if f := s.figures[g]; f.known() {
				fmt.Fprintf(b, " %.6g %.6g %.6g", f.median, f.least, f.most)
			} else {
				b.WriteString(" ? ? ?")
			}
		}
		b.WriteString("\n")
	}
	b.WriteString("EOD\n")
	fmt.Fprintf(b, "set title %s\nset xlabel %s offset 0,0.2\nset ylabel %s\nunset logscale\nset format y '%%.0s%%c'\nset xtics autofreq\nset autoscale\n",
		bold(p.title), quote(p.x), quote(p.y))
	if p.most() < 10000 {
		b.WriteString("set format y '%g'\n")
	}
	if p.log {
		b.WriteString("set logscale y\n")
	} else {
		b.WriteString("set yrange [0:*]\n")
	}
	map[string]func(*strings.Builder, int){"bars": p.bars, "lines": p.lines, "latency": p.latency, "ratios": p.ratios}[p.kind](b, n)
}

// plots is the list of what a plot command draws, of the columns of each series that draw is given.
func (p panel) plots(b *strings.Builder, draw func(i int, s series) string) {
	var all []string
	for i, s := range p.series {
		all = append(all, draw(i, s))
	}
	fmt.Fprintf(b, "plot %s\n", strings.Join(all, ", \\\n     "))
}

func (p panel) bars(b *strings.Builder, n int) {
	if p.log {
		b.WriteString("set yrange [*:*]\n")
	}
	fmt.Fprintf(b, "set errorbars 0.7 lc rgb '#202020' lw 1.2\nset style data histograms\nset style histogram errorbars gap 1 lw 1\nset xrange [-0.6:%.1f]\nset xtics scale 0\n",
		float64(len(p.groups))-0.4)
	p.plots(b, func(i int, s series) string {
		return fmt.Sprintf("$d%d using %d:%d:%d:xtic(1) title %s %s", n, 2+3*i, 3+3*i, 4+3*i, quote(s.name), onlyColour(s.style))
	})
}

// onlyColour leaves the colour of a style.
func onlyColour(style string) string {
	f := strings.Fields(style)
	return strings.Join(f[:3], " ")
}

func (p panel) lines(b *strings.Builder, n int) {
	var tics []string
	for _, x := range p.at {
		tics = append(tics, fmt.Sprint(x))
	}
	fmt.Fprintf(b, "set logscale x 2\nset xtics (%s)\nset xrange [%g:%g]\n", strings.Join(tics, ", "), p.at[0]*0.85, p.at[len(p.at)-1]*1.18)
	p.plots(b, func(i int, s series) string {
		return fmt.Sprintf("$d%d using 1:%d:%d:%d title %s with yerrorlines %s", n, 2+3*i, 3+3*i, 4+3*i, quote(s.name), s.style)
	})
}

// latency has percentiles in x, so that each nine more takes the same room.
func (p panel) latency(b *strings.Builder, n int) {
	b.WriteString("set ylabel offset 1.6,0\nset format y '%.0s%cs'\nset xtics ('50' 0.301, '90' 1, '99' 2, '99.9' 3, '99.99' 4)\nset xrange [0:4.1]\n")
	p.plots(b, func(i int, s series) string {
		return fmt.Sprintf("$d%d using (-log10(1-$1/100)):($%d*1e-6) title %s with linespoints %s ps 0.5", n, 2+3*i, quote(s.name), noSize(s.style))
	})
}

// noSize leaves all of a style but the size of its marks.
func noSize(style string) string {
	head, _, _ := strings.Cut(style, " ps ")
	return head
}

// ratios has a row for each group, and a mark for each series where it stands to one.
func (p panel) ratios(b *strings.Builder, n int) {
	fmt.Fprintf(b, `unset logscale
set logscale x 2
set format x '%%g'
set xtics (%s)
set yrange [%.1f:-0.6]
set grid x y
set ytics scale 0
set arrow 1 from 1,graph 0 to 1,graph 1 nohead lc rgb '#202020' lw 2 back
`, "'1/16' 0.0625, '1/8' 0.125, '1/4' 0.25, '1/2' 0.5, '1' 1, '2' 2, '4' 4, '8' 8, '16' 16, '32' 32, '64' 64", float64(len(p.groups))-0.4)
	p.plots(b, func(i int, s series) string {
		return fmt.Sprintf("$d%d using %d:0:ytic(1) title %s with points %s ps 1.3", n, 2+3*i, quote(s.name), noSize(s.style))
	})
}

// draw makes the SVG, without the panels that have no data: gnuplot refuses those.
func (c chart) draw(ctx context.Context, path string) error {
	c.panels = slices.DeleteFunc(slices.Clone(c.panels), func(p panel) bool { return len(p.series) == 0 })
	if len(c.panels) == 0 {
		return fmt.Errorf("%s: there is nothing to draw", c.name)
	}
	cmd := exec.CommandContext(ctx, "gnuplot")
	cmd.Stdin = strings.NewReader(c.script(path))
	out, err := cmd.CombinedOutput()
	if err == nil && len(out) > 0 { // it warns of data that it could not draw
		err = errors.New("it has something to say")
	}
	if err != nil {
		return fmt.Errorf("gnuplot, %s: %w\n%s", c.name, err, out)
	}
	return nil
}

// bars of all peers for some tests.
func (r run) bars(head, y string, tests, groups, peers []string, what func(result) float64) panel {
	p := panel{title: head, y: y, kind: "bars", groups: groups}
	for _, peer := range peers {
		s := series{name: peer, style: styleOf(peer)}
		for _, t := range tests {
			s.figures = append(s.figures, r.of(t, peer, what))
		}
		if slices.ContainsFunc(s.figures, figure.known) {
			p.series = append(p.series, s)
		}
	}
	return p
}

func (r run) byDepth(head, job string, peers []string) panel {
	p := r.bars(head, "requests/s", depthTests(job), nil, peers, func(x result) float64 { return x.Rate })
	p.kind, p.x = "lines", "requests at a time"
	for _, d := range depths {
		p.at = append(p.at, float64(d))
	}
	return p
}

func (r run) latencies(head, test, kind string, peers []string) panel {
	p := panel{title: head, x: "percentile", y: "latency", kind: "latency", log: true, at: quantiles}
	for _, peer := range peers {
		s := series{name: peer, style: styleOf(peer)}
		for _, q := range quantiles {
			s.figures = append(s.figures, r.latency(test, peer, kind, q))
		}
		if slices.ContainsFunc(s.figures, figure.known) {
			p.series = append(p.series, s)
		}
	}
	return p
}

func (r run) ratios(tests, peers []string) panel {
	p := panel{x: "vdisk's rate, of each other's: to the left of 1 vdisk is slower, to the right it is faster", kind: "ratios"}
	for _, t := range tests {
		p.groups = append(p.groups, title(t))
	}
	for _, peer := range peers {
		if peer == "vdisk" {
			continue
		}
		s := series{name: "of " + peer, style: styleOf(peer)}
		for _, t := range tests {
			c, is := compare(t, peer, r.rate(t, "vdisk"), r.rate(t, peer))
			if !is {
				c.ratio = math.NaN()
			}
			s.figures = append(s.figures, figure{c.ratio, c.ratio, c.ratio, 1})
		}
		p.series = append(p.series, s)
	}
	return p
}
