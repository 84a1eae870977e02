package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/mattn/go-runewidth"
	"golang.org/x/term"
)

// heading is the head of a column of a table.
type heading struct {
	text  string
	right bool                   // the column has numbers, and is aligned to the right
	free  bool                   // the column has text of any length: it is cut if the table is wider than the terminal
	bad   func(text string) bool // the text means that something is wrong; nil: none does
}

// headings returns the heads of columns of text.
func headings(texts ...string) (all []heading) {
	for _, t := range texts {
		all = append(all, heading{text: t})
	}
	return all
}

// numbers returns the heads of columns of numbers.
func numbers(texts ...string) (all []heading) {
	for _, t := range texts {
		all = append(all, heading{text: t, right: true})
	}
	return all
}

// gap is between two columns.
const gap = "  "

// table prints rows in columns. For scripts it prints no header and separates columns by tabs.
func (a *app) table(header []heading, rows [][]string, script bool) error {
	for i, row := range rows {
		rows[i] = make([]string, len(row))
		for k, text := range row {
			rows[i][k] = cell(text)
		}
	}
	var lines strings.Builder
	if script {
		for _, row := range rows {
			fmt.Fprintln(&lines, strings.Join(row, "\t"))
		}
		_, err := io.WriteString(a.stdout, lines.String())
		return err
	}
	var names []string
	for _, h := range header {
		names = append(names, h.text)
	}
	rows = append([][]string{names}, rows...)
	widths := widthsOf(header, rows, terminalWidth(a.stdout))
	to, paint := a.stdout, a.colored()
	if paint {
		to = rawOf(to) // all cells are escaped, and colours must not be
	}
	for n, row := range rows {
		line := paintedLine(header, widths, row, paint)
		if paint && n == 0 {
			line = bold + line + plain
		}
		fmt.Fprintln(&lines, line)
	}
	_, err := io.WriteString(to, lines.String())
	return err
}

// widthsOf returns the width of each column. If the table is wider than most, columns of free text become narrower, the
// widest first, as long as their heads fit. most is 0 if there is no limit.
func widthsOf(header []heading, rows [][]string, most int) []int {
	widths := make([]int, len(header))
	total := len(gap) * (len(header) - 1)
	for k := range header {
		for _, row := range rows {
			widths[k] = max(widths[k], runewidth.StringWidth(row[k]))
		}
		total += widths[k]
	}
	for most > 0 && total > most {
		widest := -1
		for k, h := range header {
			if h.free && widths[k] > runewidth.StringWidth(h.text) && (widest < 0 || widths[k] > widths[widest]) {
				widest = k
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
		total--
	}
	return widths
}

func lineOf(header []heading, widths []int, row []string) string {
	return paintedLine(header, widths, row, false)
}

// paintedLine is lineOf, with what means that something is wrong in red.
func paintedLine(header []heading, widths []int, row []string, paint bool) string {
	var line strings.Builder
	for k, text := range row {
		if k > 0 {
			line.WriteString(gap)
		}
		text = runewidth.Truncate(text, widths[k], "…")
		if header[k].right {
			text = runewidth.FillLeft(text, widths[k])
		} else {
			text = runewidth.FillRight(text, widths[k])
		}
		if paint && header[k].bad != nil && header[k].bad(row[k]) {
			text = red + text + plain
		}
		line.WriteString(text)
	}
	return strings.TrimRight(line.String(), " ")
}

// terminalWidth returns the columns of the terminal behind w, or 0 if it is none.
func terminalWidth(w io.Writer) int {
	f, ok := rawOf(w).(interface{ Fd() uintptr })
	if !ok {
		return 0
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}
