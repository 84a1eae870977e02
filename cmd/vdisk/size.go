package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode"

	"github.com/docker/go-units"
)

// parseSize parses a size: a number of bytes, or one with K, M, G, T or P, which are powers of 1024. It refuses
// ambiguous units, such as GB (10^9 or 2^30).
func parseSize(s string) (int64, error) {
	if strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII }) { // such letters may become others, or longer
		return 0, usagef("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
	}
	lower := strings.ToLower(s)
	bare := strings.TrimSuffix(lower, "b")
	if len(bare) > 0 && bare != lower && strings.ContainsAny(bare[len(bare)-1:], "kmgtp") {
		return 0, usagef("size %q: write %siB for 1024s; units of 1000 are not used", s, s[:len(bare)])
	}
	if s == "" || strings.ContainsAny(lower, " +-xe_") || !strings.ContainsAny(s[:1], "0123456789") {
		return 0, usagef("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
	}
	number, shift := strings.TrimSuffix(strings.TrimSuffix(lower, "b"), "i"), 0
	if k := strings.IndexByte(sizeUnits, number[len(number)-1]); k >= 0 {
		number, shift = number[:len(number)-1], 10*(k+1)
	} else if number != strings.TrimSuffix(lower, "b") {
		return 0, usagef("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
	}
	if n, err := strconv.ParseUint(number, 10, 64); err == nil {
		if n > math.MaxInt64>>shift {
			return 0, usagef("size %q: that is more than %s", s, units.BytesSize(math.MaxInt64))
		}
		return int64(n) << shift, nil
	}
	f, err := strconv.ParseFloat(number, 64)
	switch f *= float64(int64(1) << shift); {
	case f >= math.MaxInt64:
		return 0, usagef("size %q: that is more than %s", s, units.BytesSize(math.MaxInt64))
	case err != nil || !(f >= 0):
		return 0, usagef("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
	}
	return int64(f), nil
}

// sizeBetween parses the size that a flag or an argument gives. The size must be between least and most.
func (a *app) sizeBetween(what, text string, least, most int64) (int64, error) {
	n, err := parseSize(text)
	if err != nil {
		return 0, fmt.Errorf("%s: %w; the range is %s to %s", what, err, a.size(least), a.size(most))
	}
	if n < least || n > most {
		return 0, usagef("%s %s: the range is %s to %s", what, text, a.size(least), a.size(most))
	}
	return n, nil
}

// sizeUnits are the units 1024, 1024², and so on.
const sizeUnits = "kmgtp"

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
