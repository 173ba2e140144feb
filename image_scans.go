package main

// The decoder goes over the whole image in each scan, so a small file of many
// scans takes it very long. Encoders make about 10 progressive scans, at most
// some dozens: no more than maxProgressiveScans are decoded, and of a large image
// no more than go over maxScannedPixels, but minProgressiveScans at any size. In
// a sequential image each component is in one scan (ITU-T T.81, section A.2), and
// there are four components at most.
const (
	maxProgressiveScans = 100
	minProgressiveScans = 20
	maxScannedPixels    = 400_000_000 // some seconds of work
	maxSequentialScans  = 4
)

// maxScans is how many scans an image may have.
func (f *jpegFrame) maxScans() int {
	if !f.progressive {
		return maxSequentialScans
	}
	pixels := max(1, int64(f.width)*int64(f.height))
	return int(min(maxProgressiveScans, max(minProgressiveScans, maxScannedPixels/pixels)))
}

// checkScans refuses a JPEG with more scans than any encoder makes. It costs a
// look at the whole file, and no decoding.
func (f *jpegFrame) checkScans(data []byte) error {
	scans, most := 0, f.maxScans()
	for s := range jpegSegments(data) {
		if s.kind != jpegSOS {
			continue
		}
		if scans++; scans > most {
			return permanent("too_many_scans", "jpeg of %d×%d pixels in more than %d scans", f.width, f.height, most)
		}
	}
	return nil
}
