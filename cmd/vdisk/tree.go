package main

import "strings"

// Parts of the lines of a tree, for an item and for what is below it.
const (
	treeItem, treeBelow         = "├─ ", "│  "
	treeLastItem, treeBelowLast = "└─ ", "   "
)

// treeOf returns the items so that each follows what it comes from: snapshots their volume, and clones their snapshot,
// or its volume if that snapshot is not in items. draw adds the lines of the tree to them. Items of the same parent stay
// in their order.
func treeOf(items []item, draw bool) []item {
	index := map[string]int{}
	for k, i := range items {
		index[i.name()] = k
	}
	below := make([][]int, len(items))
	var roots []int
	for k, i := range items {
		if parent, ok := parentOf(i, index); ok {
			below[parent] = append(below[parent], k)
		} else {
			roots = append(roots, k)
		}
	}
	tree := make([]item, 0, len(items))
	var add func(k int, branch, under string)
	add = func(k int, branch, under string) {
		i := items[k]
		if draw {
			i.branch = branch
		}
		tree = append(tree, i)
		for n, child := range below[k] {
			if n == len(below[k])-1 {
				add(child, under+treeLastItem, under+treeBelowLast)
			} else {
				add(child, under+treeItem, under+treeBelow)
			}
		}
	}
	for _, k := range roots {
		add(k, "", "")
	}
	return tree
}

// parentOf returns the place of what an item comes from, if that is in index. A volume that was rolled back comes from a
// snapshot of its own, which is below it: it has no parent.
func parentOf(i item, index map[string]int) (int, bool) {
	if i.snapshot != nil {
		parent, ok := index[i.volume.Name]
		return parent, ok
	}
	volume, _, _ := strings.Cut(i.volume.Origin, "@")
	if volume == i.volume.Name {
		return 0, false
	}
	if parent, ok := index[i.volume.Origin]; ok {
		return parent, true
	}
	parent, ok := index[volume]
	return parent, ok
}
