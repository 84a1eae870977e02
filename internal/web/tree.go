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
}

// tree is the tree of all volumes, or of those that were looked for.
type tree struct {
	Rows  []row
	All   int // rows of the whole tree
	Found int // of these, rows that were looked for
}

// node is a volume or a snapshot. A store may have very many, and few of them get a row.
type node struct {
	name, parent string
	volume       *owner.Volume
	snapshot     *cow.SnapshotInfo // nil: it is the volume
}

// nodesOf returns a node for each volume and each snapshot, a volume before its snapshots.
func nodesOf(volumes []owner.Volume) []node {
	n := len(volumes)
	for i := range volumes {
		n += len(volumes[i].Snapshots)
	}
	nodes := make([]node, 0, n)
	for i := range volumes {
		v := &volumes[i]
		nodes = append(nodes, node{v.Name, v.Origin, v, nil})
		for k := range v.Snapshots {
			nodes = append(nodes, node{v.Name + "@" + v.Snapshots[k].Name, v.Name, v, &v.Snapshots[k]})
		}
	}
	return nodes
}

// row returns the row of a node, without its place in the tree.
func (n node) row() row {
	v := n.volume
	r := row{Name: n.name}
	for _, d := range v.Devices {
		if d.Ref.String() == n.name {
			r.Devices = append(r.Devices, d.Path)
		}
	}
	if sn := n.snapshot; sn != nil {
		r.Kind, r.Volume, r.Snapshot, r.Size, r.Created = "snapshot", v.Name, sn.Name, sn.Size, sn.Created
		for _, h := range sn.Holds {
			r.Holds = append(r.Holds, h.Tag)
		}
		return r
	}
	r.Kind, r.Size, r.Created, r.Open, r.Codec = "volume", v.Size, v.Created, v.Open, v.Codec
	switch {
	case v.Receiving != nil:
		r.Kind = "receiving"
	case v.Origin != "" && !strings.HasPrefix(v.Origin, v.Name+"@"):
		r.Kind = "clone"
	}
	return r
}

// treeOf returns the rows whose name has the text find, as 'vdisk ls --tree' orders them: what comes from another row is
// below it.
func treeOf(volumes []owner.Volume, find string) tree {
	nodes := nodesOf(volumes)
	t := tree{All: len(nodes)}
	if find = strings.ToLower(find); find != "" {
		nodes = slices.DeleteFunc(nodes, func(n node) bool { return !strings.Contains(strings.ToLower(n.name), find) })
	}
	t.Found = len(nodes)
	index := make(map[string]int, len(nodes))
	for i := range nodes {
		index[nodes[i].name] = i
	}
	below, roots := make([][]int, len(nodes)), []int(nil)
	for i := range nodes {
		if p, _ := nodes[i].above(index); p >= 0 {
			below[p] = append(below[p], i)
		} else {
			roots = append(roots, i)
		}
	}
	var add func(i int, under []string, deeper int)
	add = func(i int, under []string, deeper int) {
		r := nodes[i].row()
		r.Guides, r.Deeper = under, deeper
		_, r.Origin = nodes[i].above(index)
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

// above returns the place of the node that this one comes from, or -1, and the origin that is to be written beside its row.
// Of a clone whose snapshot is gone, or is not among the nodes, it is its origin's volume, and the origin is written. So it
// is of a volume that was rolled back: it comes from a snapshot of its own, which is below it.
func (n node) above(index map[string]int) (place int, origin string) {
	volume, _, _ := strings.Cut(n.parent, "@")
	own := n.snapshot == nil && volume == n.name
	if p, ok := index[n.parent]; ok && !own {
		return p, ""
	}
	if n.snapshot != nil {
		return -1, ""
	}
	if p, ok := index[volume]; ok && !own {
		return p, n.parent
	}
	return -1, n.parent
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
