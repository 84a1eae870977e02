//go:build race

package metadata

const damages = 300
