package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
)

const (
	// blobCacheControl lets everyone keep a stored image for ever: its key
	// changes with its content.
	blobCacheControl = "public, max-age=31536000, immutable"

	s3DialTimeout   = 5 * time.Second
	s3HeaderTimeout = 30 * time.Second // between the last byte sent and the first of the answer
	s3Timeout       = time.Minute      // for one attempt in all
	s3Attempts      = 3                // longer outages are the pipeline's to wait for
)

// blobKey names the stored image of a job: products/{product}/{job}-{first 16
// hex digits of the content's SHA-256}.{ext}. The same job with the same result
// gets the same key, so that doing it twice leaves one object.
func blobKey(productID, jobID int64, data []byte, ext string) string {
	sum := sha256.Sum256(data)
	return fmt.Sprintf("products/%d/%d-%x.%s", productID, jobID, sum[:8], ext)
}

// s3Blobs keeps images in a bucket of S3 or of a server that speaks its protocol.
type s3Blobs struct {
	client *s3.Client
	bucket string
	base   string // of URLs, without a slash at its end
}

// newS3Blobs returns the blobs in a bucket. Region, credentials and endpoint
// come from getenv by the names that the AWS SDK knows, and what is not there
// from the SDK's own chain: shared files, web identity, instance roles. With an
// endpoint the bucket is a part of the path, since other servers rarely have
// a host name for each. publicURL is the base of the URLs for clients, or ""
// for the bucket's own.
func newS3Blobs(ctx context.Context, bucket, publicURL string, getenv func(string) string) (*s3Blobs, error) {
	options, err := s3Config(getenv)
	if err != nil {
		return nil, err
	}
	cfg, err := awsconfig.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("load aws config: %w", err)
	}
	var endpoint string
	if v := cmp.Or(getenv("AWS_ENDPOINT_URL_S3"), getenv("AWS_ENDPOINT_URL")); v != "" {
		if err := baseURL(&endpoint)(v); err != nil {
			return nil, fmt.Errorf("AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL %w", err)
		}
	}
	client := s3.NewFromConfig(cfg, func(o *s3.Options) {
		if endpoint != "" {
			o.BaseEndpoint = new(endpoint)
		}
		o.UsePathStyle = o.BaseEndpoint != nil
		if o.Region == "" && o.BaseEndpoint != nil {
			o.Region = "us-east-1" // the signature needs one, and it is what such servers expect
		}
	})
	base := publicURL
	if base == "" {
		if base, err = bucketURL(ctx, client.Options(), bucket); err != nil {
			return nil, err
		}
	}
	return &s3Blobs{client: client, bucket: bucket, base: strings.TrimRight(base, "/")}, nil
}

// s3Config returns what getenv and this program set in the SDK's awsconfig.
func s3Config(getenv func(string) string) ([]func(*awsconfig.LoadOptions) error, error) {
	options := []func(*awsconfig.LoadOptions) error{
		awsconfig.WithHTTPClient(s3HTTPClient()),
		awsconfig.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) { o.MaxAttempts = s3Attempts })
		}),
	}
	if region := cmp.Or(getenv("AWS_REGION"), getenv("AWS_DEFAULT_REGION")); region != "" {
		options = append(options, awsconfig.WithRegion(region))
	}
	id, secret, token := getenv("AWS_ACCESS_KEY_ID"), getenv("AWS_SECRET_ACCESS_KEY"), getenv("AWS_SESSION_TOKEN")
	switch {
	case id == "" && secret == "":
	case id == "":
		return nil, errors.New("AWS_SECRET_ACCESS_KEY is set but AWS_ACCESS_KEY_ID is not")
	case secret == "":
		return nil, errors.New("AWS_ACCESS_KEY_ID is set but AWS_SECRET_ACCESS_KEY is not")
	default:
		static := aws.Credentials{AccessKeyID: id, SecretAccessKey: secret, SessionToken: token, Source: "environment"}
		options = append(options, awsconfig.WithCredentialsProvider(
			aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return static, nil })))
	}
	return options, nil
}

func s3HTTPClient() *awshttp.BuildableClient {
	return awshttp.NewBuildableClient().
		WithTimeout(s3Timeout).
		WithDialerOptions(func(d *net.Dialer) { d.Timeout = s3DialTimeout }).
		WithTransportOptions(func(t *http.Transport) { t.ResponseHeaderTimeout = s3HeaderTimeout })
}

// bucketURL asks the SDK for the address of a bucket, which depends on region,
// partition, endpoint, and for lack of a certificate on dots in its name.
func bucketURL(ctx context.Context, o s3.Options, bucket string) (string, error) {
	if o.Region == "" {
		return "", errors.New("AWS_REGION is not set")
	}
	endpoint, err := o.EndpointResolverV2.ResolveEndpoint(ctx, s3.EndpointParameters{
		Bucket:         new(bucket),
		Region:         new(o.Region),
		Endpoint:       o.BaseEndpoint,
		ForcePathStyle: new(o.UsePathStyle),
	})
	if err != nil {
		return "", fmt.Errorf("resolve url of bucket %s: %w", bucket, err)
	}
	return endpoint.URI.String(), nil
}

// Put stores an object. It is handed to the SDK as something that can be read
// again, for the retries, the signature and the checksum.
func (b *s3Blobs) Put(ctx context.Context, key string, data []byte) error {
	_, err := b.client.PutObject(ctx, &s3.PutObjectInput{
		Bucket:       new(b.bucket),
		Key:          new(key),
		Body:         bytes.NewReader(data),
		ContentType:  new(mediaType(key)),
		CacheControl: new(blobCacheControl),
	})
	return wrap(err, "put blob %s", key)
}

// Delete removes an object. That it is not there is fine.
func (b *s3Blobs) Delete(ctx context.Context, key string) error {
	_, err := b.client.DeleteObject(ctx, &s3.DeleteObjectInput{
		Bucket: new(b.bucket),
		Key:    new(key),
	})
	if answer, ok := errors.AsType[smithy.APIError](err); ok && answer.ErrorCode() == "NoSuchKey" { // S3 itself says 204
		return nil
	}
	return wrap(err, "delete blob %s", key)
}

// Ping reports whether the bucket is there and may be used.
func (b *s3Blobs) Ping(ctx context.Context) error {
	_, err := b.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: new(b.bucket)})
	return wrap(err, "head bucket %s", b.bucket)
}

// URL returns where clients get an object.
func (b *s3Blobs) URL(key string) string { return b.base + "/" + key }
