package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// parseSize reads a size: bytes, or K, M, G, T, P of 1024. Units that are ambiguous (GB: 10^9 or 2^30?) are refused.
func parseSize(s string) (int64, error) {
	lower := strings.ToLower(s)
	bare := strings.TrimSuffix(lower, "b")
	if len(bare) > 0 && bare != lower && strings.ContainsAny(bare[len(bare)-1:], "kmgtp") {
		return 0, usagef("size %q: write %siB for 1024s; units of 1000 are not used", s, s[:len(bare)])
	}
	if s == "" || strings.ContainsAny(lower, " +-xe_") || !strings.ContainsAny(s[:1], "0123456789") {
		return 0, usagef("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n < 0 {
		return 0, usagef("size %q: write a number of bytes, or one with K, M, G or T (1024s), as 10G", s)
	}
	return n, nil
}

// size shows a number of bytes.
func (a *app) size(n int64) string {
	if a.bytes {
		return strconv.FormatInt(n, 10)
	}
	if n < 0 {
		return "-" + units.BytesSize(-float64(n))
	}
	return units.BytesSize(float64(n))
}

// ratio shows how many times smaller what is stored is than what is mapped.
func (u *usageJSON) ratio() string {
	if u.Referenced <= 0 || u.Mapped <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", float64(u.Mapped)/float64(u.Referenced))
}
