// Sbom prints what a Go program is made of, as CycloneDX 1.6 in JSON: the modules that the linker has put into it, with
// their versions and checksums, and the Go release. The program itself says so, which is more than a list of what a build
// might take.
//
//	sbom -name vdisk -version 1.2.0 bin/vdisk
//
// The same program gives the same text: its time is SOURCE_DATE_EPOCH, and it has no serial number.
package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

type bom struct {
	Schema       string       `json:"$schema"`
	Format       string       `json:"bomFormat"`
	Spec         string       `json:"specVersion"`
	Version      int          `json:"version"`
	Metadata     metadata     `json:"metadata"`
	Components   []component  `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

type metadata struct {
	Timestamp string    `json:"timestamp,omitempty"`
	Component component `json:"component"`
}

type component struct {
	Ref        string     `json:"bom-ref"`
	Type       string     `json:"type"`
	Name       string     `json:"name"`
	Version    string     `json:"version"`
	PURL       string     `json:"purl"`
	Hashes     []hash     `json:"hashes,omitempty"`
	Properties []property `json:"properties,omitempty"`
}

type hash struct {
	Algorithm string `json:"alg"`
	Content   string `json:"content"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn"`
}

func main() {
	name := flag.String("name", "", "`name` of the program")
	version := flag.String("version", "", "`version` of the program")
	flag.Parse()
	if flag.NArg() != 1 || *name == "" || *version == "" {
		fmt.Fprintln(os.Stderr, "usage: sbom -name NAME -version VERSION PROGRAM")
		os.Exit(2)
	}
	b, err := describe(flag.Arg(0), *name, *version, os.Getenv("SOURCE_DATE_EPOCH"))
	if err == nil {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(b)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

// describe returns the description of the program in a file. epoch is its time in seconds, or "".
func describe(file, name, version, epoch string) (*bom, error) {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return nil, err
	}
	sum, err := sumOf(file)
	if err != nil {
		return nil, err
	}
	b := &bom{Schema: "http://cyclonedx.org/schema/bom-1.6.schema.json", Format: "CycloneDX", Spec: "1.6", Version: 1}
	if epoch != "" {
		seconds, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
		b.Metadata.Timestamp = time.Unix(seconds, 0).UTC().Format(time.RFC3339)
	}
	program := component{Type: "application", Name: name, Version: version, Hashes: []hash{{"SHA-256", sum}}}
	program.PURL = "pkg:golang/" + info.Main.Path + "@" + version
	program.Ref = program.PURL
	for _, s := range info.Settings {
		program.Properties = append(program.Properties, property{"go:build:" + s.Key, s.Value})
	}
	b.Metadata.Component = program
	b.add(component{Type: "library", Name: "std", Version: info.GoVersion, PURL: "pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go")})
	for _, m := range info.Deps {
		c, err := library(m)
		if err != nil {
			return nil, err
		}
		b.add(c)
	}
	all := dependency{Ref: program.Ref}
	for _, c := range b.Components {
		all.DependsOn = append(all.DependsOn, c.Ref)
	}
	b.Dependencies = []dependency{all}
	return b, nil
}

func (b *bom) add(c component) {
	c.Ref = c.PURL
	b.Components = append(b.Components, c)
}

// library describes a module. Its checksum is go.sum's, which is a SHA-256 of the list of its files and their sums, and so
// no hash of one file.
func library(m *debug.Module) (component, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	c := component{Type: "library", Name: m.Path, Version: m.Version, PURL: "pkg:golang/" + m.Path + "@" + m.Version}
	text, ok := strings.CutPrefix(m.Sum, "h1:")
	sum, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || len(sum) != sha256.Size {
		return component{}, fmt.Errorf("module %s %s has the sum %q, which is no h1: sum", m.Path, m.Version, m.Sum)
	}
	c.Properties = []property{{"go:sum", m.Sum}}
	return c, nil
}

func sumOf(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
