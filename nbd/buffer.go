package nbd

import (
	"math/bits"
	"sync"
)

// minBufferBits makes 4 KiB the smallest buffer size, which is the most common request.
const minBufferBits = 12

// buffer is a pooled byte slice. The capacity of b is a power of two.
type buffer struct {
	b     []byte
	class int
}

// bufferPools has one pool for each size from 4 KiB to MaxPayload.
var bufferPools [bufferClasses]sync.Pool

const bufferClasses = 25 - minBufferBits + 1 // 2^25 is MaxPayload

func bufferClass(n int) int {
	if n <= 1<<minBufferBits {
		return 0
	}
	return bits.Len(uint(n-1)) - minBufferBits
}

// bufferSize returns how much memory a buffer of length n takes.
func bufferSize(n int) int64 { return 1 << (bufferClass(n) + minBufferBits) }

// newBuffer returns a buffer of length n, at most MaxPayload, with arbitrary content. The caller owns the buffer until
// it calls free.
func newBuffer(n int) *buffer {
	class := bufferClass(n)
	if v := bufferPools[class].Get(); v != nil {
		buf := v.(*buffer)
		buf.b = buf.b[:n]
		return buf
	}
	return &buffer{b: make([]byte, n, 1<<(class+minBufferBits)), class: class}
}

func (b *buffer) free() {
	bufferPools[b.class].Put(b)
}
