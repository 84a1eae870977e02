package format

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

var (
	// ErrName is matched by the errors of CheckName.
	ErrName = errors.New("invalid name")
	// ErrNotStore is matched by the error of DecodeStoreInfo for a file that does not belong to a store.
	ErrNotStore = errors.New("not a vdisk store")
)

const (
	maxName     = 63
	storeFormat = "vdisk store"
)

// moreInSnapshots are the characters that a snapshot's name may have, and a volume's may not. Names that have them came
// with version 5 of the store.
const moreInSnapshots = ":+"

// CheckName returns nil if s can be the name of a volume or the tag of a hold: an ASCII letter or digit, then at most 62
// letters, digits, dots, underscores and hyphens. Otherwise it returns an error that matches ErrName.
func CheckName(s string) error { return checkName(s, "") }

// CheckSnapshotName is CheckName for a snapshot, which may also have colons and plus signs, as times have them.
func CheckSnapshotName(s string) error { return checkName(s, moreInSnapshots) }

// checkName is CheckName, with some more characters allowed behind the first.
func checkName(s, more string) error {
	if len(s) == 0 || len(s) > maxName {
		return fmt.Errorf("%w: it has %d bytes, not 1 to %d", ErrName, len(s), maxName)
	}
	more = "._-" + more
	for i, c := range s { // the whole rune, not one of its bytes
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		switch {
		case alnum || i > 0 && strings.ContainsRune(more, c):
		case i == 0:
			return fmt.Errorf("%w: %q at the beginning of %q is neither a letter nor a digit", ErrName, c, s)
		default:
			return fmt.Errorf("%w: %q at byte %d of %q is neither a letter, nor a digit, nor one of %q", ErrName, c, i, s, more)
		}
	}
	return nil
}

// checkText returns nil if s is UTF-8 without control characters, and otherwise an error that matches ErrName.
func checkText(s string) error {
	for i, c := range s {
		if c == utf8.RuneError || unicode.IsControl(c) {
			return fmt.Errorf("%w: %q at byte %d", ErrName, c, i)
		}
	}
	return nil
}

// StoreInfo is the content of a store's file "format".
type StoreInfo struct {
	Format  string    `json:"format"`
	Version int       `json:"version"`
	UUID    string    `json:"uuid"`
	Created time.Time `json:"created"`
}

// NewStoreInfo returns the info of a new store of version StoreVersion.
func NewStoreInfo(uuid [16]byte, created time.Time) StoreInfo {
	return StoreInfo{Format: storeFormat, Version: StoreVersion, UUID: formatUUID(uuid), Created: created}
}

// ID returns the store's UUID in the form that chunk headers hold. The error matches ErrCorrupt.
func (s *StoreInfo) ID() ([16]byte, error) {
	var id [16]byte
	raw := make([]byte, 0, 32)
	for i := range len(s.UUID) {
		if s.UUID[i] != '-' {
			raw = append(raw, s.UUID[i])
		}
	}
	if len(raw) != 32 {
		return id, corrupt("store", "uuid %q", s.UUID)
	}
	if _, err := hex.Decode(id[:], raw); err != nil || formatUUID(id) != s.UUID {
		return id, corrupt("store", "uuid %q", s.UUID)
	}
	return id, nil
}

func formatUUID(id [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[0:4], id[4:6], id[6:8], id[8:10], id[10:16])
}

// Encode returns the content of the file.
func (s *StoreInfo) Encode() ([]byte, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode store: %w", err)
	}
	return append(text, '\n'), nil
}

// DecodeStoreInfo decodes the content of the file, which is all of src. The error matches ErrNotStore if the file does
// not belong to a store, ErrVersion if the store is of a later version, and ErrCorrupt if it is damaged.
func DecodeStoreInfo(src []byte) (StoreInfo, error) {
	// A later version may have other fields, so look at these two first.
	var head struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if len(src) == 0 {
		return StoreInfo{}, fmt.Errorf("%w: it is empty", ErrNotStore)
	}
	if err := json.Unmarshal(src, &head); err != nil {
		return StoreInfo{}, fmt.Errorf("%w: %w", ErrNotStore, err)
	}
	if head.Format != storeFormat {
		return StoreInfo{}, fmt.Errorf("%w: its format is %q", ErrNotStore, head.Format)
	}
	if err := checkVersion("store", head.Version, StoreVersion); err != nil {
		return StoreInfo{}, err
	}
	var s StoreInfo
	if err := decodeJSON(src, &s); err != nil {
		return StoreInfo{}, corrupt("store", "%v", err)
	}
	if _, err := s.ID(); err != nil {
		return StoreInfo{}, err
	}
	return s, nil
}
