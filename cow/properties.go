package cow

import (
	"fmt"
	"maps"
	"slices"

	"github.com/vdisk/vdisk/format"
)

// SetProperties gives a volume the properties of changes, and leaves its others as they are. An empty value removes a
// property. Those whose names begin with ratelimit.Prefix limit the volume's clients, from now on.
func (s *Store) SetProperties(name string, changes map[string]string) error {
	if err := format.CheckProperties(changes); err != nil {
		return fmt.Errorf("set %s: %v: %w", name, err, ErrInvalid)
	}
	for _, key := range slices.Sorted(maps.Keys(changes)) {
		if value := changes[key]; value != "" { // what an older program has set can be removed
			if err := checkLimit(key, value); err != nil {
				return fmt.Errorf("set %s: %s: %v: %w", name, key, err, ErrInvalid)
			}
		}
	}
	var open *volume
	err := s.transact(func() (*format.Event, error) {
		v, _, err := s.lookup(Ref{Volume: name})
		if err == nil && v.writer {
			open = v
		}
		if err == nil {
			err = v.received()
		}
		if err != nil {
			return nil, err
		}
		row := v.Volume
		if row.Properties = maps.Clone(row.Properties); row.Properties == nil {
			row.Properties = map[string]string{}
		}
		for key, value := range changes {
			if row.Properties[key] = value; value == "" {
				delete(row.Properties, key)
			}
		}
		if maps.Equal(row.Properties, v.Properties) {
			return nil, nil
		}
		if err := format.CheckProperties(row.Properties); err != nil {
			return nil, fmt.Errorf("%v: %w", err, ErrInvalid)
		}
		return &format.Event{Op: "set", Volumes: []format.Volume{row}}, nil
	})
	if err == nil && open != nil {
		s.counted(open)
	}
	return wrapIf(err, "set %s", name)
}
