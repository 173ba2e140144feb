package main

// huffmanTable is a Huffman code made for an image (T.81, annexes C and K.2).
type huffmanTable struct {
	bits    [17]uint8 // how many codes have each length
	symbols []uint8   // by length of their codes
	codes   [256]uint32
}

// Codes hold their length in the low five bits, and themselves above.
const codeLengthBits = 5

// newHuffmanTable makes the best table for symbols that are used as often as
// counts says.
func newHuffmanTable(counts *[256]int) huffmanTable {
	var t huffmanTable
	lengths := huffmanLengths(counts)
	histogram := limitLengths(lengths)
	for n := range t.bits {
		t.bits[n] = uint8(histogram[n])
	}
	// Symbols stand by the length that they had before lengths were limited
	// (figure K.4): what is rarer still gets the longer code.
	for length := 1; length <= maxLength; length++ {
		for symbol, l := range lengths[:256] {
			if l == length {
				t.symbols = append(t.symbols, uint8(symbol))
			}
		}
	}
	code, next := uint32(0), 0
	for length := 1; length <= 16; length++ {
		for range t.bits[length] {
			t.codes[t.symbols[next]] = code<<codeLengthBits | uint32(length)
			code++
			next++
		}
		code <<= 1
	}
	return t
}

// maxLength bounds the codes before they are limited to sixteen bits: their
// length grows by one at most with each of the Fibonacci numbers, which soon
// exceed any count.
const maxLength = 64

// huffmanLengths finds the length of each symbol's code (figure K.1). The
// last stands for none: it has the code of ones alone, which T.81 reserves.
func huffmanLengths(counts *[256]int) (lengths [257]int) {
	var frequency [257]int
	copy(frequency[:], counts[:])
	frequency[256] = 1
	var next [257]int // the next symbol in the same tree, counted from one
	for {
		a, b := twoRarest(&frequency)
		if b < 0 {
			return lengths
		}
		frequency[a] += frequency[b]
		frequency[b] = 0
		for lengths[a]++; next[a] != 0; lengths[a]++ {
			a = next[a] - 1
		}
		next[a] = b + 1
		for lengths[b]++; next[b] != 0; lengths[b]++ {
			b = next[b] - 1
		}
	}
}

// twoRarest finds the two trees that are used least; of equals the last, so that
// the reserved one goes deepest. b is -1 if there is but one.
func twoRarest(frequency *[257]int) (a, b int) {
	a, b = -1, -1
	for i, f := range frequency {
		switch {
		case f == 0:
		case a < 0 || f <= frequency[a]:
			a, b = i, a
		case b < 0 || f <= frequency[b]:
			b = i
		}
	}
	return a, b
}

// limitLengths counts the codes of each length, shortens those above sixteen bits
// (figure K.3) and takes the reserved one away.
func limitLengths(lengths [257]int) (histogram [maxLength + 1]int) {
	for _, l := range lengths {
		if l > 0 {
			histogram[l]++
		}
	}
	for i := maxLength; i > 16; i-- {
		for histogram[i] > 0 {
			j := i - 2
			for histogram[j] == 0 {
				j--
			}
			// Two of length i: one takes their parent's place, the other
			// goes with a shorter one, now longer by a bit.
			histogram[i] -= 2
			histogram[i-1]++
			histogram[j+1] += 2
			histogram[j]--
		}
	}
	longest := 16
	for histogram[longest] == 0 {
		longest--
	}
	histogram[longest]--
	return histogram
}

// length is how many bytes symbols take that are used as often as counts says,
// with their extra bits, without stuffing.
func (t *huffmanTable) length(counts *[256]int) int {
	total := 0
	for symbol, n := range counts {
		extra := symbol & 15 // a value's size
		if extra == 0 && symbol < 0xf0 {
			extra = symbol >> 4 // a run of blocks
		}
		total += n * (int(t.codes[symbol]&(1<<codeLengthBits-1)) + extra)
	}
	return total/8 + 1
}

// appendHuffmanTables writes DHT (T.81, B.2.4.2).
func appendHuffmanTables(out []byte, s *jpegScan, tables []huffmanTable) []byte {
	size := 0
	for i := range tables {
		size += 17 + len(tables[i].symbols)
	}
	out = appendJPEGHead(out, jpegDHT, size)
	class := byte(0) // DC
	if s.first > 0 {
		class = 1 << 4
	}
	for i := range tables {
		out = append(out, class|byte(i))
		out = append(out, tables[i].bits[1:]...)
		out = append(out, tables[i].symbols...)
	}
	return out
}
