// Package size parses sizes as people write them.
package size

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode"

	"github.com/docker/go-units"
)

// Prefixes are 1024, 1024², and so on.
const Prefixes = "kmgtp"

// Parse parses a size: a number of bytes, or one with K, M, G, T or P, which are powers of 1024. It refuses
// ambiguous units, such as GB (10^9 or 2^30).
func Parse(s string) (int64, error) {
	if strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII }) { // such letters may become others, or longer
		return 0, notSize(s)
	}
	lower := strings.ToLower(s)
	bare := strings.TrimSuffix(lower, "b")
	if len(bare) > 0 && bare != lower && strings.ContainsAny(bare[len(bare)-1:], Prefixes) {
		return 0, fmt.Errorf("size %q: write %siB for 1024s; units of 1000 are not used", s, s[:len(bare)])
	}
	if s == "" || strings.ContainsAny(lower, " +-xe_") || !strings.ContainsAny(s[:1], "0123456789") {
		return 0, notSize(s)
	}
	number, shift := strings.TrimSuffix(strings.TrimSuffix(lower, "b"), "i"), 0
	if k := strings.IndexByte(Prefixes, number[len(number)-1]); k >= 0 {
		number, shift = number[:len(number)-1], 10*(k+1)
	} else if number != strings.TrimSuffix(lower, "b") {
		return 0, notSize(s)
	}
	if n, err := strconv.ParseUint(number, 10, 64); err == nil {
		if n > math.MaxInt64>>shift {
			return 0, fmt.Errorf("size %q: that is more than %s", s, units.BytesSize(math.MaxInt64))
		}
		return int64(n) << shift, nil
	}
	f, err := strconv.ParseFloat(number, 64)
	switch f *= float64(int64(1) << shift); {
	case f >= math.MaxInt64:
		return 0, fmt.Errorf("size %q: that is more than %s", s, units.BytesSize(math.MaxInt64))
	case err != nil || !(f >= 0):
		return 0, notSize(s)
	}
	return int64(f), nil
}

func notSize(s string) error {
	return fmt.Errorf("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
}
