package main

import (
	"cmp"
	"encoding"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// documented are the objects of docs/json.md.
var documented = map[string]any{
	"volume": volumeJSON{}, "snapshot": snapshotJSON{}, "usage": usageJSON{}, "total": totalJSON{}, "hold": holdJSON{}, "pruned": prunedJSON{}, "kept": keptJSON{}, "receiving": receivingJSON{},
	"store": storeJSON{}, "owner": ownerJSON{}, "device": deviceJSON{}, "service": serviceJSON{}, "client": clientJSON{}, "scrub": scrubJSON{}, "run": cow.ScrubRun{},
	"machine device": machineDeviceJSON{}, "stats": statsJSON{}, "queue": queueStatsJSON{}, "operation": opStatsJSON{},
	"features": featuresJSON{}, "availability": owner.Availability{}, "ublk": owner.UblkFeatures{}, "ublk feature": owner.UblkFeature{}, "reclaim": owner.Reclaim{},
	"difference": differenceJSON{}, "extent": extentJSON{}, "comparison": compareJSON{}, "range": sparse.Range{}, "damage": damageJSON{}, "lost": lostJSON{},
	"salvage": salvageJSON{}, "repair": repairedJSON{}, "imported difference": importedDiffJSON{},
	"sent": sentJSON{}, "received": receivedJSON{}, "stream": streamJSON{},
	"check": checkJSON{}, "problem": problemJSON{}, "rebuilt": cow.Rebuilt{}, "gc": gcJSON{}, "cold": cow.ColdReport{}, "bench": benchJSON{}, "step": stepJSON{},
	"event": journal.Entry{}, "caller": journal.Caller{}, "top": topJSON{}, "top volume": topVolumeJSON{}, "metric": metrics.Family{}, "sample": metrics.Sample{}, "flattened": flattenedJSON{}, "version": versionJSON{}, "error": errorJSON{},
}

// differenceJSON is what diffJSON writes piece by piece.
type differenceJSON struct {
	From     string       `json:"from"`
	To       string       `json:"to"`
	Extents  []extentJSON `json:"extents"`
	FromSize int64        `json:"from_size"`
	ToSize   int64        `json:"to_size"`
	Damage   []damageJSON `json:"damage,omitempty"`
}

// TestJSONDocument holds docs/json.md to the types that are printed: each object, field and type, and each command.
func TestJSONDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	names := map[reflect.Type]string{}
	for name, v := range documented {
		names[reflect.TypeOf(v)] = name
	}
	objects := strings.Split(string(text), "\n### ")
	var found []string
	for _, object := range objects[1:] {
		name, table, _ := strings.Cut(object, "\n")
		found = append(found, name)
		if documented[name] == nil {
			t.Errorf("%s is no object that a command prints", name)
			continue
		}
		var got []string
		for _, row := range regexp.MustCompile("(?m)^\\| `([^`]*)` \\| (.*?) \\| (.+) \\|$").FindAllStringSubmatch(table, -1) {
			got = append(got, row[1]+": "+row[2])
		}
		if want := fieldsOf(t, reflect.TypeOf(documented[name]), names); !slices.Equal(got, want) {
			t.Errorf("%s: the document has\n%s\nand the type has\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	for name := range documented {
		if !slices.Contains(found, name) {
			t.Errorf("%s is not in the document", name)
		}
	}
	listed := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|").FindAllStringSubmatch(objects[0], -1) {
		listed[row[1]] = true
	}
	for _, c := range (&app{}).program().VisibleCommands() {
		if !listed[c.Name] {
			t.Errorf("the command %s is not in the document", c.Name)
		}
		delete(listed, c.Name)
	}
	for name := range maps.Keys(listed) {
		t.Errorf("there is no command %s", name)
	}
	if want := fmt.Sprintf("This page describes version %d;", jsonVersion); !strings.Contains(string(text), want) {
		t.Errorf("the document does not say: %s", want)
	}
}

// fieldsOf returns the fields of a type in JSON, each with its type in the words of the document.
func fieldsOf(t *testing.T, of reflect.Type, names map[reflect.Type]string) (fields []string) {
	for i := range of.NumField() {
		f := of.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			fields = append(fields, fieldsOf(t, f.Type, names)...)
			continue
		case name == "-":
			continue
		case name == "":
			t.Errorf("%v.%s has no name in JSON", of, f.Name)
		}
		optional := options != ""
		words := wordsFor(f.Type, names)
		switch {
		case optional:
			words += " (may be missing)"
		case f.Type.Kind() == reflect.Pointer:
			words += ", or null"
		}
		fields = append(fields, name+": "+words)
	}
	return fields
}

func wordsFor(of reflect.Type, names map[reflect.Type]string) string {
	if of.Kind() == reflect.Pointer {
		of = of.Elem()
	}
	if name := names[of]; name != "" {
		return fmt.Sprintf("[%s](#%s)", name, strings.ReplaceAll(name, " ", "-"))
	}
	if of == reflect.TypeFor[time.Time]() {
		return "time"
	}
	if of.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
		return "string"
	}
	switch of.Kind() {
	case reflect.Slice:
		elem := wordsFor(of.Elem(), names)
		return "list of " + cmp.Or(map[string]string{"string": "strings"}[elem], elem)
	case reflect.Array:
		return map[int]string{2: "pairs"}[of.Len()] + " of " + wordsFor(of.Elem(), names) + "s"
	case reflect.Map:
		return "object of " + wordsFor(of.Elem(), names) + "s"
	case reflect.Bool:
		return "boolean"
	case reflect.String:
		return "string"
	case reflect.Float64:
		return "number"
	case reflect.Int, reflect.Int64, reflect.Uint32, reflect.Uint64:
		return "integer"
	case reflect.Interface:
		return "value"
	}
	return of.String()
}
