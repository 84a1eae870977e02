package format

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"
)

// GUID identifies the state that a snapshot holds, in all stores. The zero GUID stands for none.
type GUID [16]byte

// IsZero reports whether g stands for no state.
func (g GUID) IsZero() bool { return g == GUID{} }

// String returns 32 hexadecimal digits, or nothing for the zero GUID.
func (g GUID) String() string {
	if g.IsZero() {
		return ""
	}
	return hex.EncodeToString(g[:])
}

// MarshalText returns the text of String.
func (g GUID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText accepts what MarshalText returns, and nothing else. The error matches ErrCorrupt.
func (g *GUID) UnmarshalText(text []byte) error {
	*g = GUID{}
	if len(text) == 0 {
		return nil
	}
	if n, err := hex.Decode(g[:], text[:min(len(text), 2*len(g))]); err != nil || n != len(g) || g.String() != string(text) {
		return corrupt("guid", "%q", text)
	}
	return nil
}

// GUIDOf returns the GUID of a snapshot. That of a row which an older program wrote is derived: from the id of the
// store, and from the fields of the row that never change.
func (s *Snapshot) GUIDOf(store [16]byte) (g GUID) {
	if !s.GUID.IsZero() {
		return s.GUID
	}
	b := le.AppendUint32(store[:], s.Branch)
	b = le.AppendUint32(b, s.Epoch)
	b = le.AppendUint32(b, s.ID)
	b = le.AppendUint64(b, uint64(s.Created.UnixNano()))
	sum := sha256.Sum256(b)
	copy(g[:], sum[:])
	return g
}

// MaxHolds is the largest number of holds of a snapshot.
const MaxHolds = 64

// CheckHolds returns nil if a snapshot can have these holds: at most MaxHolds, and each tag is a name (CheckName).
// Otherwise it returns an error that matches ErrName.
func CheckHolds(m map[string]time.Time) error {
	if len(m) > MaxHolds {
		return fmt.Errorf("%w: %d holds, the most is %d", ErrName, len(m), MaxHolds)
	}
	for tag := range m {
		if err := CheckName(tag); err != nil {
			return fmt.Errorf("tag: %w", err)
		}
	}
	return nil
}

// Bounds of the properties of a volume.
const (
	// MaxProperties is the largest number of properties.
	MaxProperties = 64
	// MaxPropertyValue is the largest length in bytes of a value.
	MaxPropertyValue = 1024
	// MaxPropertyBytes is the largest length in bytes of all keys and values together. A row is written again with each
	// change of the volume.
	MaxPropertyBytes = 16 << 10
)

// CheckProperties returns nil if a volume can have these properties. Otherwise it returns an error that matches ErrName.
// There may be at most MaxProperties, of at most MaxPropertyBytes together. A key has 1 to 63 ASCII letters, digits,
// dots, underscores, hyphens and colons, and begins with a letter or digit. A value has at most MaxPropertyValue bytes of
// UTF-8, without control characters.
func CheckProperties(m map[string]string) error {
	if len(m) > MaxProperties {
		return fmt.Errorf("%w: %d properties, the most is %d", ErrName, len(m), MaxProperties)
	}
	size := 0
	for key, value := range m {
		size += len(key) + len(value)
		if err := checkName(key, ":"); err != nil {
			return fmt.Errorf("property: %w", err)
		}
		if len(value) > MaxPropertyValue {
			return fmt.Errorf("%w: property %s has %d bytes, the most is %d", ErrName, key, len(value), MaxPropertyValue)
		}
		if err := checkText(value); err != nil {
			return fmt.Errorf("property %s: %w", key, err)
		}
	}
	if size > MaxPropertyBytes {
		return fmt.Errorf("%w: the properties have %d bytes together, the most is %d", ErrName, size, MaxPropertyBytes)
	}
	return nil
}
