package nbd

// The replies of a session, as it has negotiated them: simple ones, structured ones, or those with extended headers,
// which are structured, too.

// requestLen returns the length of a request's header.
func (s *session) requestLen() int {
	if s.extended {
		return extRequestLen
	}
	return requestLen
}

// chunkLen returns the length of a chunk's header.
func (s *session) chunkLen() int {
	if s.extended {
		return extChunkLen
	}
	return chunkLen
}

// appendSimple appends a simple reply without content. With extended headers, which know no simple ones, it appends a
// chunk without content, and errno must be 0.
func (s *session) appendSimple(b []byte, r request, errno uint32) []byte {
	if s.extended {
		return s.appendChunk(b, chunkFlagDone, chunkNone, r, 0)
	}
	b = be.AppendUint32(b, magicSimple)
	b = be.AppendUint32(b, errno)
	return be.AppendUint64(b, r.cookie)
}

// appendChunk appends the header of a chunk with length bytes of content.
func (s *session) appendChunk(b []byte, flags, typ uint16, r request, length uint32) []byte {
	if s.extended {
		b = be.AppendUint32(b, magicExtReply)
	} else {
		b = be.AppendUint32(b, magicChunk)
	}
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, r.cookie)
	if s.extended {
		b = be.AppendUint64(b, r.asked)
		return be.AppendUint64(b, uint64(length))
	}
	return be.AppendUint32(b, length)
}

// appendOffsetData appends an OFFSET_DATA chunk without its data.
func (s *session) appendOffsetData(b []byte, flags uint16, r request, off uint64, length uint32) []byte {
	b = s.appendChunk(b, flags, chunkOffsetData, r, length+8)
	return be.AppendUint64(b, off)
}

func (s *session) appendOffsetHole(b []byte, flags uint16, r request, off uint64, length uint32) []byte {
	b = s.appendChunk(b, flags, chunkOffsetHole, r, 12)
	b = be.AppendUint64(b, off)
	return be.AppendUint32(b, length)
}

// appendErrorChunk appends an ERROR chunk, or ERROR_OFFSET where it is known what failed.
func (s *session) appendErrorChunk(b []byte, r request, f failure) []byte {
	typ, length := uint16(chunkError), uint32(6+len(f.text))
	if f.located {
		typ, length = chunkErrorOffset, length+8
	}
	b = s.appendChunk(b, chunkFlagDone, typ, r, length)
	b = be.AppendUint32(b, f.errno)
	b = be.AppendUint16(b, uint16(len(f.text)))
	b = append(b, f.text...)
	if f.located {
		b = be.AppendUint64(b, f.at)
	}
	return b
}

// statusLen returns the length of a chunk with n descriptors.
func (s *session) statusLen(n int) int {
	if s.extended {
		return extChunkLen + 8 + 16*n
	}
	return chunkLen + 4 + 8*n
}

// appendStatus appends the chunk of a metadata context.
func (s *session) appendStatus(b []byte, flags uint16, r request, id uint32, pieces []piece) []byte {
	length := uint32(s.statusLen(len(pieces)) - s.chunkLen())
	if s.extended {
		b = s.appendChunk(b, flags, chunkStatusExt, r, length)
		b = be.AppendUint32(b, id)
		b = be.AppendUint32(b, uint32(len(pieces)))
		for _, x := range pieces {
			b = be.AppendUint64(b, uint64(x.length))
			b = be.AppendUint64(b, uint64(x.status))
		}
		return b
	}
	b = s.appendChunk(b, flags, chunkBlockStatus, r, length)
	b = be.AppendUint32(b, id)
	for _, x := range pieces {
		b = be.AppendUint32(b, uint32(x.length))
		b = be.AppendUint32(b, x.status)
	}
	return b
}
