package main

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/internal/natural"
)

// TestTable: numbers are aligned to the right, texts to the left, and nothing is at the end of a line.
func TestTable(t *testing.T) {
	var out bytes.Buffer
	a := &app{stdout: &out}
	header := append(append(headings("NAME"), numbers("SIZE")...), headings("ORIGIN")...)
	if err := a.table(header, [][]string{{"vm1", "1GiB", "-"}, {"größer", "20GiB", "vm1@a"}}, false); err != nil {
		t.Fatal(err)
	}
	want := "NAME     SIZE  ORIGIN\n" +
		"vm1      1GiB  -\n" +
		"größer  20GiB  vm1@a\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

// TestNarrowTable: on a terminal that is too narrow, texts of any length are cut, names and numbers are not, and no head
// is.
func TestNarrowTable(t *testing.T) {
	header := []heading{{text: "NAME"}, {text: "USED", right: true}, {text: "HOLDS", free: true}, {text: "CLONES", free: true}}
	row := []string{"some-long-name", "1.5GiB", "a,b,c,d,e,f,g,h,i", strings.Repeat("vm1,", 20)}
	rows := [][]string{{"NAME", "USED", "HOLDS", "CLONES"}, row}
	for most, want := range map[int][]int{0: {14, 6, 17, 80}, 60: {14, 6, 17, 17}, 42: {14, 6, 8, 8}, 20: {14, 6, 5, 6}} {
		if got := widthsOf(header, rows, most); !slices.Equal(got, want) {
			t.Errorf("%d columns: widths %v, want %v", most, got, want)
		}
	}
	if got, want := lineOf(header, []int{14, 6, 8, 8}, row), "some-long-name  1.5GiB  a,b,c,d…  vm1,vm1…"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestNatural: numbers in names are ordered by value.
func TestNatural(t *testing.T) {
	want := []string{"", "01", "1", "2", "10", "a", "a.b", "a1b2", "a1b10", "a2", "a10", "a10b", "a18446744073709551616", "b"}
	for i, x := range want {
		for k, y := range want {
			if got, want := natural.Compare(x, y), cmp.Compare(i, k); got != want {
				t.Errorf("%q and %q: %d, want %d", x, y, got, want)
			}
		}
	}
}

// TestPaintedLine: what means that something is wrong is red, without the blanks being counted wrong.
func TestPaintedLine(t *testing.T) {
	header := []heading{{text: "NAME"}, {text: "DEVICE", bad: deviceColumn().bad}, {text: "SIZE", right: true}}
	for text, want := range map[string]string{
		"/dev/ublkb0 (waits)": "v  " + red + "/dev/ublkb0 (waits)" + plain + "  1GiB",
		"/dev/ublkb0":         "v  /dev/ublkb0          1GiB",
	} {
		if got := paintedLine(header, []int{1, 19, 4}, []string{"v", text, "1GiB"}, true); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
