package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vdisk/vdisk/cow"
)

// defaultWarnAt is the default of --warn-at.
const defaultWarnAt = "80,90,95"

// parseFillLevels parses --warn-at. The result is sorted.
func parseFillLevels(text string) ([]int, error) {
	if text == "off" {
		return nil, nil
	}
	var levels []int
	for part := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil {
			return nil, usagef("--warn-at %s: %q is no percentage; give some, as %s, or off", text, part, defaultWarnAt)
		}
		levels = append(levels, n)
	}
	slices.Sort(levels)
	if err := cow.CheckFillLevels(levels); err != nil {
		return nil, usagef("--warn-at %s: the percentages are from 1 to 100, and each is there once", text)
	}
	return levels, nil
}

// fillText says how full the store is.
func fillText(a *app, f cow.Fill) string {
	return fmt.Sprintf("%d %%: %s are stored, and from %s on new data is refused", f.Percent(), a.size(f.Bytes), a.size(f.FullAt))
}

// noteFill notes on standard error that the store is filled to one of its levels, or those of this command.
func (a *app) noteFill(i cow.StoreInfo) {
	levels := i.FillLevels
	if len(levels) == 0 {
		levels = a.fillLevels
	}
	if f := i.Fill; f != nil && len(levels) > 0 && f.Percent() >= levels[0] {
		a.note("the store is filled to %s", fillText(a, *f))
	}
}
