package web

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

const (
	shownRows   = 500
	shownGuides = 12 // levels of the tree that are drawn before a name
)

// row is a volume or snapshot in the tree.
type row struct {
	Kind     string // volume, clone, snapshot or receiving
	Name     string
	Volume   string // of a snapshot: the part of the name before the @
	Snapshot string
	Guides   []string // the lines of the tree before the name, a class for each level
	Deeper   int      // levels that are not drawn
	Size     int64
	Created  time.Time
	Devices  []string
	Open     int
	Holds    []string
	Codec    string
	Origin   string // of a volume: what it comes from, if that is not above it

	Usage         *cow.Usage
	Barred        bool
	Alone, Common float64 // widths of its exclusive and shared parts in the bar, in percent of the widest

	parent string
}

// tree is the tree of all volumes, or of those that were looked for.
type tree struct {
	Rows  []row
	All   int // rows of the whole tree
	Found int // of these, rows that were looked for
}

// rowsOf returns a row for each volume and each snapshot, a volume before its snapshots.
func rowsOf(volumes []owner.Volume) (rows []row) {
	for _, v := range volumes {
		devices := map[string][]string{}
		for _, d := range v.Devices {
			devices[d.Ref.String()] = append(devices[d.Ref.String()], d.Path)
		}
		r := row{Kind: "volume", Name: v.Name, Size: v.Size, Created: v.Created, Devices: devices[v.Name], Open: v.Open, Codec: v.Codec, parent: v.Origin}
		switch {
		case v.Receiving != nil:
			r.Kind = "receiving"
		case v.Origin != "" && !strings.HasPrefix(v.Origin, v.Name+"@"):
			r.Kind = "clone"
		}
		rows = append(rows, r)
		for _, sn := range v.Snapshots {
			name := v.Name + "@" + sn.Name
			r := row{Kind: "snapshot", Name: name, Volume: v.Name, Snapshot: sn.Name, Size: sn.Size, Created: sn.Created, Devices: devices[name], parent: v.Name}
			for _, h := range sn.Holds {
				r.Holds = append(r.Holds, h.Tag)
			}
			rows = append(rows, r)
		}
	}
	return rows
}

// treeOf returns the rows whose name has the text find, as 'vdisk ls --tree' orders them: what comes from another row is
// below it.
func treeOf(volumes []owner.Volume, find string) tree {
	rows := rowsOf(volumes)
	t := tree{All: len(rows)}
	if find = strings.ToLower(find); find != "" {
		rows = slices.DeleteFunc(rows, func(r row) bool { return !strings.Contains(strings.ToLower(r.Name), find) })
	}
	t.Found = len(rows)
	index := make(map[string]int, len(rows))
	for i := range rows {
		index[rows[i].Name] = i
	}
	below, roots := make([][]int, len(rows)), []int(nil)
	for i := range rows {
		if p, ok := parentOf(&rows[i], index); ok {
			below[p] = append(below[p], i)
		} else {
			roots = append(roots, i)
		}
	}
	var add func(i int, under []string, deeper int)
	add = func(i int, under []string, deeper int) {
		r := rows[i]
		r.Guides, r.Deeper = under, deeper
		t.Rows = append(t.Rows, r)
		above := slices.Clone(under) // what is below has these lines, too, where the tree goes on
		if n := len(above); n > 0 {
			above[n-1] = map[string]string{"tee": "pipe", "elbow": "none"}[above[n-1]]
		}
		if len(above) == shownGuides {
			above, deeper = above[1:], deeper+1
		}
		for n, child := range below[i] {
			if len(t.Rows) >= shownRows {
				return
			}
			line := "tee"
			if n == len(below[i])-1 {
				line = "elbow"
			}
			add(child, append(slices.Clone(above), line), deeper)
		}
	}
	for _, i := range roots[:min(len(roots), shownRows)] {
		if len(t.Rows) < shownRows {
			add(i, nil, 0)
		}
	}
	return t
}

// parentOf returns the place of what a row comes from. Of a clone whose snapshot is gone, or is not among the rows, that is
// its origin's volume. If that is not there either, the row has its origin written beside it. So has a volume that was
// rolled back: it comes from a snapshot of its own, which is below it.
func parentOf(r *row, index map[string]int) (int, bool) {
	volume, _, _ := strings.Cut(r.parent, "@")
	own := r.Kind != "snapshot" && volume == r.Name
	if p, ok := index[r.parent]; ok && !own {
		return p, true
	}
	if r.Kind == "snapshot" {
		return 0, false
	}
	if r.Origin = r.parent; own {
		return 0, false
	}
	p, ok := index[volume]
	return p, ok
}

// addUsage adds what the rows take.
func (t *tree) addUsage(usage map[string]cow.Usage) {
	var most int64
	for i := range t.Rows {
		if u, ok := usage[t.Rows[i].Name]; ok {
			t.Rows[i].Usage = &u
			most = max(most, u.Referenced)
		}
	}
	for i := range t.Rows {
		if r := &t.Rows[i]; r.Usage != nil && most > 0 {
			r.Barred = true
			r.Alone = 100 * float64(r.Usage.Exclusive) / float64(most)
			r.Common = 100 * float64(r.Usage.Shared) / float64(most)
		}
	}
}

// Ratio returns how much smaller the data of the row became, as the command prints it.
func (r row) Ratio() string {
	if r.Usage == nil || r.Usage.Referenced <= 0 || r.Usage.Mapped <= 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", float64(r.Usage.Mapped)/float64(r.Usage.Referenced))
}
