package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"

	"github.com/vdisk/vdisk/internal/size"
)

// parseSize parses a size that a flag or an argument gives.
func parseSize(s string) (int64, error) {
	n, err := size.Parse(s)
	if err != nil {
		return 0, usageError{nil, err}
	}
	return n, nil
}

// sizeBetween parses the size that a flag or an argument gives. The size must be between least and most.
func (a *app) sizeBetween(what, text string, least, most int64) (int64, error) {
	n, err := parseSize(text)
	if err != nil {
		if what != "size" { // which the error says itself
			err = fmt.Errorf("%s: %w", what, err)
		}
		return 0, fmt.Errorf("%w; the range is %s to %s", err, a.size(least), a.size(most))
	}
	if n < least || n > most {
		err := usagef("%s %s: the range is %s to %s", what, text, a.size(least), a.size(most))
		if 0 < n && n < least && strings.Trim(text, "0123456789") == "" {
			err = fmt.Errorf("%w; a number alone is bytes, and %sG would be GiB", err, text)
		}
		return 0, err
	}
	return n, nil
}

// size formats a number of bytes.
func (a *app) size(n int64) string {
	if a.bytes {
		return strconv.FormatInt(n, 10)
	}
	if n < 0 {
		return "-" + units.BytesSize(-float64(n))
	}
	return units.BytesSize(float64(n))
}

// ratio formats how many times smaller the stored data is than the mapped data.
func (u *usageJSON) ratio() string {
	if u.Referenced <= 0 || u.Mapped <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", float64(u.Mapped)/float64(u.Referenced))
}
