package journal

import (
	"encoding/json"
	"fmt"
	"maps"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// Text returns what the entry is about, and what is known of it, in one line for people. It has so many names at most; 0:
// all. size formats numbers of bytes.
func (e Entry) Text(most int, size func(int64) string) string {
	names := e.Names
	if n := len(names) + e.LeftOut; most > 0 && n > most && len(names) >= most {
		names = append(slices.Clone(names[:most-1]), fmt.Sprintf("and %d more", n-most+1))
	}
	parts := slices.Clone(names)
	if e.From != "" {
		parts = append(parts, "from "+e.From)
	}
	if e.Phase != "" {
		parts = append(parts, "("+e.Phase+")")
	}
	for _, key := range slices.Sorted(maps.Keys(e.Details)) {
		parts = append(parts, key+"="+detail(key, e.Details[key], size))
	}
	if e.Error != "" {
		parts = append(parts, "failed: "+strings.ReplaceAll(e.Error, "\n", "; "))
	}
	return strings.Join(parts, " ")
}

// detail returns the text of a detail.
func detail(key string, v any, size func(int64) string) string {
	switch v := v.(type) {
	case string:
		if v == "" || strings.ContainsAny(v, " \t\n\"") {
			return strconv.Quote(v)
		}
		return v
	case json.Number:
		if n, err := v.Int64(); err == nil && (key == "size" || strings.HasSuffix(key, "_bytes")) {
			return size(n)
		}
		return v.String()
	case []any:
		var list []string
		for _, x := range v {
			list = append(list, fmt.Sprint(x))
		}
		return strings.Join(list, ",")
	}
	return fmt.Sprint(v)
}

// Users has the names of users that were looked up. Only one goroutine uses it.
type Users map[uint32]string

// By returns a caller for people: the user, and the process; "-" if there is none.
func (u Users) By(c *Caller) string {
	if c == nil {
		return "-"
	}
	name, ok := u[c.UID]
	if !ok {
		name = strconv.FormatUint(uint64(c.UID), 10)
		if found, err := user.LookupId(name); err == nil {
			name = found.Username
		}
		u[c.UID] = name
	}
	return fmt.Sprintf("%s/%d", name, c.PID)
}
