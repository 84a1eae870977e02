package ratelimit

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/vdisk/vdisk/internal/size"
)

// Prefix is how the names of the properties begin that limit a volume.
const Prefix = "limit."

const (
	leastBytes = 4 << 10
	mostBytes  = 1 << 50
	mostOps    = 1_000_000_000
	mostBurst  = time.Hour
)

// settings are the properties that limit a volume, without the prefix. Each sets its limit from a value.
var settings = []struct {
	name string
	set  func(*Limits, string) error
}{
	{"iops", ops(all)},
	{"iops-read", ops(reads)},
	{"iops-write", ops(writes)},
	{"bps", bytes(all)},
	{"bps-read", bytes(reads)},
	{"bps-write", bytes(writes)},
	{"burst", burst},
}

func ops(k kind) func(*Limits, string) error {
	return func(l *Limits, value string) error {
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n < 1 || n > mostOps {
			return fmt.Errorf("%q is no number of requests a second, from 1 to %d", value, mostOps)
		}
		l.Ops[k] = n
		return nil
	}
}

func bytes(k kind) func(*Limits, string) error {
	return func(l *Limits, value string) error {
		n, err := size.Parse(value)
		if err == nil && (n < leastBytes || n > mostBytes) {
			err = fmt.Errorf("%q is less than 4K or more than 1024T of bytes a second", value)
		}
		if err == nil {
			l.Bytes[k] = n
		}
		return err
	}
}

func burst(l *Limits, value string) error {
	d, err := time.ParseDuration(value)
	if err != nil || d < DefaultBurst || d > mostBurst {
		return fmt.Errorf("%q is no time from %v to 1h, such as 30s", value, DefaultBurst)
	}
	l.Burst = d
	return nil
}

// Properties returns the names of the properties that limit the rate of a volume.
func Properties() (names []string) {
	for _, s := range settings {
		names = append(names, Prefix+s.name)
	}
	return names
}

// CheckProperty reports whether a property is one of these, and returns why it cannot have a value, which is not empty.
func CheckProperty(key, value string) (known bool, err error) {
	name, _ := strings.CutPrefix(key, Prefix)
	for _, s := range settings {
		if key != name && s.name == name {
			return true, s.set(new(Limits), value)
		}
	}
	return false, nil
}

// Of returns the limits that a volume's properties ask for. A value that CheckProperty refuses limits nothing: another
// version, or another store that sent the volume, may know it.
func Of(properties map[string]string) (l Limits) {
	for _, s := range settings {
		if value, ok := properties[Prefix+s.name]; ok {
			_ = s.set(&l, value)
		}
	}
	return l
}
